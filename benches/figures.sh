#!/usr/bin/env bash
# Measures what the figures of the README show, and draws them into benches/figures.
#
#   benches/figures.sh            measures and draws
#   benches/figures.sh --draw     draws again what was measured
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" != --draw ]; then
    benches/compare.sh --rounds 5 --seconds 1.5 --json benches/figures/throughput.tsv 50x1 50x4 50x16 50x64 50x128
    # About half of what kurir answers at most so.
    benches/compare.sh --rounds 5 --seconds 4 --rate 60000 --json benches/figures/latency.tsv 50x1
fi
cargo build --release --locked --example figures >&2
for figure in throughput latency; do
    target/release/examples/figures benches/figures/$figure.tsv benches/figures/$figure.svg
done
