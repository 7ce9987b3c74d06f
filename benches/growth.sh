#!/usr/bin/env bash
# How the cost of a message grows: the CPU time of the whole server, the kernel's part included, for a SEND MESSAGE among more
# users, more messages that wait, and over more connections. The server has one core and the load another.
#
#   benches/growth.sh [--rounds N] [--seconds S]
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=3 seconds=2
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        *) echo "what is $1?" >&2; exit 2 ;;
    esac
done
cargo build --release --locked --bins --example growth >&2
kurir=target/release/kurir growth=target/release/examples/growth
server_core=0 load_core=$(( $(nproc) > 1 ? 1 : 0 ))
work=$(mktemp -d -p target growth.XXXXXX)
pid=
trap '[ -z "$pid" ] || kill "$pid"; rm -rf "$work"' EXIT
ulimit -n "$(ulimit -Hn)"

ticks() { awk '{ print $14 + $15 }' "/proc/$pid/stat"; } # of user and system time, of all its threads

measure() { # CONNECTIONS PIPELINE USERS MESSAGES: microseconds of CPU time a message
    local connections=$1 pipeline=$2 users=$3 messages=$4 address before requests
    rm -rf "$work/data"
    "$growth" --prepare "$work/data" "$users" "$messages" 2>/dev/null
    sync
    taskset -c $server_core "$kurir" serve --registration open --listen 127.0.0.1:0 --data "$work/data" --log warn \
        --mailbox-messages-max 1000000000 --mailbox-bytes-max 1TiB --messages-max 1000000000 \
        --registrations-per-minute-max 0 >"$work/out" &
    pid=$!
    for _ in $(seq 400); do grep -q '^listening on' "$work/out" && break; sleep 0.05; done
    address=$(sed -n 's/^listening on //p' "$work/out")
    # Its users are made, and a first message sent, before it counts.
    taskset -c "$load_core" "$kurir" bench --server "$address" --connections 1 --users 1 --seconds 0 --warm-up 0.1 >/dev/null
    # A checkpoint of what was prepared may be made first.
    while before=$(ticks); sleep 0.3; [ "$before" != "$(ticks)" ]; do :; done
    requests=$(taskset -c "$load_core" "$kurir" bench --server "$address" --connections "$connections" --pipeline "$pipeline" \
        --users 1 --receivers "$users" --seconds "$seconds" --warm-up 0 --json | sed 's/.*"requests":\([0-9]*\).*/\1/')
    # The password of its one user is hashed twice, which takes some 50 ms of all.
    awk -v t="$(( $(ticks) - before ))" -v n="$requests" -v hz="$(getconf CLK_TCK)" 'BEGIN { printf "%.3f", (t / hz - 0.05) * 1e6 / n }'
    kill "$pid"
    wait "$pid" 2>/dev/null || true
    pid=
}

row() { # WHAT SIZE CONNECTIONS PIPELINE USERS MESSAGES
    local cost
    cost=$(for _ in $(seq "$rounds"); do measure "$3" "$4" "$5" "$6"; echo; done | sort -g | sed -n "$(( (rounds + 1) / 2 ))p")
    if [ "${what:-}" != "$1 x $4" ]; then what="$1 x $4" first=$cost; fi
    awk -v w="$1" -v s="$2" -v c="$cost" -v f="$first" -v x="$3 x $4" \
        'BEGIN { printf "%-20s %9d   %-11s %8.2f us a message, %.2f times the first\n", w, s, x, c, c / f }'
}

echo "CPU time of the server, medians of $rounds rounds of $seconds s"
for users in 10 1000 100000; do row users "$users" 50 1 "$users" 0; done
for users in 10 1000 100000; do row users "$users" 50 16 "$users" 0; done
for messages in 0 1000000 10000000; do row 'messages that wait' "$messages" 50 16 1000 "$messages"; done
for connections in 1 100 10000; do row connections "$connections" "$connections" 16 1000 0; done
