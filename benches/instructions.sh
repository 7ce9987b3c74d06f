#!/usr/bin/env bash
# Instructions for each of the eight requests, over the engine without a socket or a disk, counted by valgrind.
#
#   benches/instructions.sh             prints them, and fails where one has grown by more than 5% over the baseline
#   benches/instructions.sh --update    makes them the baseline, which is benches/instructions.txt
#
# valgrind shows every program the same processor, but for what the real one lacks: without AVX2 the libraries take other paths,
# and the figures are printed and not compared.
#
# It needs valgrind and installs it with apt-get where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v valgrind >/dev/null; then
    echo "valgrind is missing; installing it with apt-get" >&2
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -qq >&2
    $as_root apt-get install -qq -y --no-install-recommends valgrind libc6-dbg >&2
fi
cargo build --release --locked --example instructions >&2

# Copies of many bytes are one instruction that is counted as often as it has bytes, where the processor has it.
export GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=1000000000:glibc.cpu.x86_rep_stosb_threshold=1000000000
baseline=benches/instructions.txt
counted=$(mktemp)
processor=$(uname -m)$(grep -qw avx2 /proc/cpuinfo && echo ' with avx2' || true)
is_same=$([ "$processor" = "$(sed -n 's/^# //p' "$baseline" 2>/dev/null)" ] && echo yes || echo no)
echo "# $processor" >"$counted"
[ "$is_same" = yes ] || echo "the baseline was counted on another kind of processor: not compared" >&2
trap 'rm -f "$counted"' EXIT
failed=0
while read -r request; do
    said=$(mktemp)
    requests=$(valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect='*instructions::measured*' \
        target/release/examples/instructions "$request" 2>"$said" </dev/null) || { cat "$said" >&2; exit 1; }
    total=$(sed -n 's/.*Collected : //p' "$said")
    rm -f "$said"
    each=$(( total / requests ))
    before=$(sed -n "s/^$request	//p" "$baseline" 2>/dev/null || true)
    printf '%s\t%s\n' "$request" "$each" >>"$counted"
    if [ "$is_same" = yes ] && [ -n "$before" ] && [ $(( each * 100 )) -gt $(( before * 105 )) ]; then
        printf '%-20s %9d   (%d before: more than 5%% more)\n' "$request" "$each" "$before"
        failed=1
    else
        printf '%-20s %9d   (%s before)\n' "$request" "$each" "${before:-nothing}"
    fi
done <<'REQUESTS'
AUTH
SEND MESSAGE
SEND GROUP MESSAGE
SEND FILE
SEND GROUP FILE
MY FILE
INBOX
DOWNLOAD FILE
REQUESTS

if [ "${1:-}" = --update ]; then
    cp "$counted" "$baseline"
    exit 0
fi
exit $failed
