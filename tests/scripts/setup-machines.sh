#!/usr/bin/env bash
# Makes what the booted machines of the tests need: the tools that pack our packages, and the root that all machines share, a small Debian
# with systemd as its first process, systemd-resolved (off), PostgreSQL, Redis and nginx. Both lie below the target folder and are made once; the root is
# made anew when this file changes.
set -euo pipefail

cd "$(dirname "$0")/../.."
machines=$(realpath -m "${CARGO_TARGET_DIR:-target}")/machines
recipe=$(sha256sum "$0" | cut -c 1-16)
base=$machines/base-$recipe

make_base() {
  local suite mirror building=$machines/building.$$
  # The mirror of this machine, whatever it is.
  suite=$(. /etc/os-release && echo "${VERSION_CODENAME:?this machine does not say which Debian it is}")
  mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(CREATED_BY)' | awk -v suite="$suite" '$2 == suite && $3 == "Packages" {print $1; exit}')
  [ -n "$mirror" ] || { echo "apt knows no mirror of $suite" >&2; return 1; }
  echo "making the root of the machines: $suite from $mirror"
  rm -rf "$machines"/building.* "$machines"/base-*
  mkdir -p "$building"
  local packages=systemd,systemd-sysv,systemd-resolved,libnss-resolve,dbus,nftables,iproute2,iputils-ping,procps,postgresql,postgresql-client,redis-server,nginx-light
  debootstrap --variant=minbase --include=$packages \
    "$suite" "$building" "$mirror" >"$machines/debootstrap.log" 2>&1 || { tail -n 30 "$machines/debootstrap.log" >&2; return 1; }
  # Each machine gets a name and an id of its own. Without an id, systemd would take its start for the first and enable everything.
  rm -rf "$building"/var/cache/apt/archives/*.deb "$building"/var/lib/apt/lists/* "$building/var/lib/dbus/machine-id" "$building/etc/machine-id" \
    "$building/etc/hostname" "$building/etc/resolv.conf"
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$building/etc/hosts"
  chroot "$building" systemctl --quiet disable postgresql redis-server nginx apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer getty@tty1 console-getty systemd-networkd-wait-online.service systemd-pstore systemd-resolved 2>/dev/null
  # Debian's own firewall begins with `flush ruleset`: what we load at boot has to cope with it.
  chroot "$building" systemctl --quiet enable nftables systemd-networkd 2>/dev/null
  mv "$building" "$base"
}

mkdir -p "$machines"
exec 9>"$machines/lock"
flock 9
systemd/package.sh tools &
tools=$!
[ -d "$base" ] || make_base
wait "$tools"
ln -sfn "$(basename "$base")" "$machines/base"
