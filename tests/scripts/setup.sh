#!/usr/bin/env bash
# Installs what the lab, the demo and the tests run besides Rust: on a Debian or Ubuntu machine, as root. Does nothing where all is there.
set -euo pipefail

# command:package
wanted=(
  nft:nftables ip:iproute2 tcpdump:tcpdump psql:postgresql-client wg:wireguard-tools wireguard-go:wireguard-go
  nc:netcat-openbsd ping:iputils-ping setpriv:util-linux nsenter:util-linux cc:gcc make:make sqlite3:sqlite3
  kdig:knot-dnsutils systemd-analyze:systemd systemd-nspawn:systemd-container debootstrap:debootstrap dpkg-deb:dpkg rpm:rpm
  docker:docker.io dockerd:docker.io podman:podman runc:runc
)

missing=()
for pair in "${wanted[@]}"; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)

if ! command -v cargo >/dev/null 2>&1; then
  echo "cargo is missing: install Rust first, see https://rustup.rs" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "run this as root: the lab makes network namespaces and the agents make TUN interfaces" >&2
  exit 1
fi
if [ ! -c /dev/net/tun ]; then
  mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200 2>/dev/null || true
  [ -c /dev/net/tun ] || { echo "there is no /dev/net/tun: load the kernel's tun module" >&2; exit 1; }
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
  echo "these are missing, and only apt-get is known here to install them: ${missing[*]}" >&2
  exit 1
fi
echo "installing: ${missing[*]}"
# The package would start a server on this machine; the lab runs its own.
if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
  mkdir -p /etc/postgresql-common
  echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
fi
# So would those of the container runtimes.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "${missing[@]}" >/dev/null
