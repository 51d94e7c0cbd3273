#!/usr/bin/env bash
# Builds every test of the workspace, runs the suites side by side, and ends with one plain line: `N passed, N failed`.
#
# A suite is one test executable. `cargo test` would run them one after the other, and the suites of the lab spend their time waiting.
# usage: run-tests.sh [SUITE...]     only suites whose name contains one of the words
set -euo pipefail

jobs=${CLOISON_TEST_JOBS:-3}
limit=${CLOISON_SUITE_LIMIT:-900} # seconds a suite may take
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# One build of everything: the programs that the lab runs, and the test executables, with the same features of each dependency.
cargo build --workspace --all-targets --message-format=json-render-diagnostics >"$logs/build.json"
sed -n '/"profile":{[^}]*"test":true/s/.*"manifest_path":"\([^"]*\)\/Cargo.toml".*"executable":"\([^"]*\)".*/\1 \2/p' "$logs/build.json" | sort -u >"$logs/suites"

run_suite() {
  local folder=$1 executable=$2 logs=$3 limit=$4 id name start status=0
  # A library and a program of one name differ in their hash alone.
  id=$(basename "$executable") && name=${id%-*}
  start=$SECONDS
  (cd "$folder" && CARGO_MANIFEST_DIR=$folder exec timeout -k 10 "$limit" "$executable") >"$logs/$id.log" 2>&1 </dev/null || status=$?
  local summary
  summary=$(sed -n 's/^test result: [^.]*\. \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored.*/\1 \2 \3/p' "$logs/$id.log" | tail -1)
  # A suite that ended without a summary (killed, or over its time) counts as one failure.
  [ -n "$summary" ] || summary="0 1 0"
  [ "$status" = 0 ] || [ "$(cut -d' ' -f2 <<<"$summary")" != 0 ] || summary="0 1 0"
  echo "$summary" >"$logs/$id.result"
  read -r passed failed ignored <<<"$summary"
  if [ "$passed$failed$ignored" != 000 ]; then
    printf '%-34s %4d passed %3d failed %3d ignored %4ds\n' "$name" "$passed" "$failed" "$ignored" $((SECONDS - start))
  fi
  if [ "$failed" != 0 ]; then
    sed "s/^/[$name] /" "$logs/$id.log" | tail -n 400
  fi
}
export -f run_suite

wanted() {
  [ $# -gt 1 ] || return 0
  local executable=$1 word
  shift
  for word in "$@"; do [[ $(basename "$executable") == *"$word"* ]] && return 0; done
  return 1
}

# The suites that wait longest first.
long='/(interop|e2e_[a-z_]*|sim_[a-z_]*)-[0-9a-f]*$'
{ grep -E '/(e2e_systemd|interop|e2e_enroll|e2e_revoke)-' "$logs/suites" || true
  grep -E "$long" "$logs/suites" | grep -vE '/(e2e_systemd|interop|e2e_enroll|e2e_revoke)-' || true
  grep -vE "$long" "$logs/suites" || true; } >"$logs/ordered"
while read -r folder executable; do
  if wanted "$executable" "$@"; then printf '%s\0%s\0%s\0%s\0' "$folder" "$executable" "$logs" "$limit"; fi
done <"$logs/ordered" | xargs -0 -r -n 4 -P "$jobs" bash -c 'run_suite "$@"' run-suite

# Examples in the documentation, which only cargo can run; with words given, they are left out.
if [ $# = 0 ]; then
  doc=0
  cargo test --workspace --doc --quiet >"$logs/doc.log" 2>&1 || doc=$?
  sed -n 's/^test result: [^.]*\. \([0-9]*\) passed; \([0-9]*\) failed; \([0-9]*\) ignored.*/\1 \2 \3/p' "$logs/doc.log" |
    awk '{p+=$1; f+=$2; i+=$3} END {print p+0, f+0, i+0}' >"$logs/doc.result"
  if [ "$doc" != 0 ]; then
    sed 's/^/[doc] /' "$logs/doc.log"
    [ "$(cut -d' ' -f2 "$logs/doc.result")" != 0 ] || echo "0 1 0" >"$logs/doc.result"
  fi
fi

# What failed, and why, once more where it is found: at the end.
for result in "$logs"/*.result; do
  log=${result%.result}.log name=$(basename "$result" .result)
  [ "$(cut -d' ' -f2 "$result")" = 0 ] || {
    grep -aE -A 9 "^(Error: |---- |thread '.*panicked)" "$log" || tail -n 5 "$log"
  } | sed -E '/^ *(Stack backtrace.*|[0-9]+: [a-z_<]+.*::.*|at [./].*|--|)$/d' | cut -c1-300 | sed -n "1,40s/^/[${name%-*}] /p"
done

read -r passed failed ignored < <(cat "$logs"/*.result | awk '{p+=$1; f+=$2; i+=$3} END {print p+0, f+0, i+0}')
[ "$ignored" = 0 ] || echo "$ignored ignored"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" != 0 ]
