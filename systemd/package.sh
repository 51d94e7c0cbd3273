#!/usr/bin/env bash
# Makes the packages cloison-agent, cloison-coordinator and cloison from programs that are built already.
#
# usage: package.sh deb|rpm release|debug FOLDER [VERSION]     packages into FOLDER; VERSION instead of the project's, as each format writes it
#        package.sh tools                                      installs cargo-deb and cargo-generate-rpm below the target folder, if need be
#
# What goes into a package stands in the Cargo.toml of its crate; what it does when it is installed or removed, in the folders beside this.
set -euo pipefail

cargo_deb=3.8.0
cargo_generate_rpm=0.21.1

cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
tools=$target/tools
export PATH=$tools/bin:$PATH CARGO_TARGET_DIR=$target

# Unoptimised: they run for seconds, and would compile for minutes.
tool() {
  local crate=$1 version=$2
  shift 2
  [ "$(cat "$tools/$crate.version" 2>/dev/null)" != "$version" ] || return 0
  echo "installing $crate $version"
  CARGO_TARGET_DIR=$tools/build CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=64 \
    CARGO_PROFILE_RELEASE_DEBUG=0 cargo install --quiet --locked --force --root "$tools" "$crate@$version" "$@"
  echo "$version" >"$tools/$crate.version"
}

install_tools() {
  mkdir -p "$tools"
  tool cargo-deb "$cargo_deb" --no-default-features --features gzip
  tool cargo-generate-rpm "$cargo_generate_rpm"
  rm -rf "$tools/build"
}

[ "${1:-}" != tools ] || { install_tools; exit; }
[ $# -ge 3 ] || { sed -n '4,5s/^# //p' "$0" >&2; exit 64; }
format=$1 profile=$2 folder=$3 version=${4:-}
mkdir -p "$folder"
install_tools
completions=$target/$profile/completions
mkdir -p "$completions"
for program in cloison cloison-agent cloison-coordinator; do
  "$target/$profile/$program" completions bash >"$completions/$program.bash"
  "$target/$profile/$program" completions zsh >"$completions/_$program"
  "$target/$profile/$program" completions fish >"$completions/$program.fish"
done
# What cargo calls `dev` lies in the folder `debug`; what is made of it is for tests, which have no time to compress.
compress=gzip
[ "$profile" != debug ] || { profile=dev; compress=none; }
for crate in agent coordinator cli; do
  case $format in
    deb) cargo deb --quiet --locked --no-build --fast --profile "$profile" --manifest-path "$crate/Cargo.toml" ${version:+--deb-version "$version"} --output "$folder/" ;;
    rpm) cargo generate-rpm --package "$crate" --profile "$profile" --target-dir "$target" --payload-compress $compress ${version:+--set-metadata "version = \"$version\""} --output "$folder/" ;;
    *) echo "\`$format\` is no format: deb or rpm" >&2; exit 64 ;;
  esac
done
