#!/usr/bin/env bash
# Compares kurir with Redis and with a bare echo loop, on loopback: the server on one core, the load on another.
#
# The same generator (`kurir bench`) drives all three with texts of the same size: SEND MESSAGE to one of ten users, RPUSH
# onto one of ten lists, a line. They take turns, so that what else the machine does meets all alike, and what is printed
# is the median of the rounds, and the median of the ratios within each.
#
#   benches/compare.sh [--rounds N] [--seconds S] [--sync always|interval] [--rate N] [--json FILE]
#                      [CONNECTIONSxPIPELINE... | inbox]
#
# `inbox` is another comparison: mailboxes that are emptied, 100 messages at once, by INBOX and by LRANGE and LTRIM.
#
# With a rate, that many requests a second are sent to each, and it is the time to the answers that tells. The file is what
# benches/figures.sh draws from.
#
# It needs redis-server and installs it with apt-get where it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=5 seconds=2 sync=always rate=0 json= shapes=()
while [ $# -gt 0 ]; do
    case $1 in
        --rounds) rounds=$2; shift 2 ;;
        --seconds) seconds=$2; shift 2 ;;
        --sync) sync=$2; shift 2 ;;
        --rate) rate=$2; shift 2 ;;
        --json) json=$2; shift 2 ;;
        inbox | [0-9]*x[0-9]*) shapes+=("$1"); shift ;;
        *) echo "what is $1?" >&2; exit 2 ;;
    esac
done
[ ${#shapes[@]} -gt 0 ] || shapes=(1x1 50x1 50x16 50x128 1000x16 inbox)
case $sync in
    always) appendfsync=always ;;
    interval) appendfsync=everysec ;;
    *) echo "--sync is always or interval" >&2; exit 2 ;;
esac

if ! command -v redis-server >/dev/null; then
    echo "redis-server is missing; installing it with apt-get" >&2
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -qq >&2
    $as_root apt-get install -qq -y --no-install-recommends redis-server >&2
fi
cargo build --release --locked --bins --example echo --example inbox >&2
kurir=target/release/kurir echo=target/release/examples/echo inbox=target/release/examples/inbox

# On a machine with one core they share it; the figures say so.
server_core=0 load_core=$(( $(nproc) > 1 ? 1 : 0 ))
# On the same file system as the target directory, since that is a disk.
work=$(mktemp -d -p target compare.XXXXXX)
pids=()
stop() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    pids=()
}
trap 'stop; rm -rf "$work"' EXIT

address_of() { # waits for the line that says where a server listens
    for _ in $(seq 100); do
        local line
        line=$(sed -n 's/^listening on //p' "$1" | head -1)
        if [ -n "$line" ]; then echo "$line"; return; fi
        sleep 0.05
    done
    echo "$1: it does not listen" >&2
    exit 1
}

measure() { # NAME SHAPE: one line of JSON
    local name=$1 shape=$2 address data="$work/$1"
    rm -rf "$data"
    mkdir -p "$data"
    # What the one before has left to be written is not written while this one is measured.
    sync
    case $name in
        kurir)
            taskset -c $server_core "$kurir" serve --demo --listen 127.0.0.1:0 --data "$data/data" --log warn --sync "$sync" \
                --mailbox-messages-max 1000000000 --mailbox-bytes-max 1TiB --messages-max 1000000000 --inbox-messages-max 100 >"$data/out" &
            pids+=($!)
            address=$(address_of "$data/out") ;;
        echo)
            taskset -c $server_core "$echo" >"$data/out" &
            pids+=($!)
            address=$(address_of "$data/out") ;;
        redis)
            # Below the ports that the system gives to connections.
            address=127.0.0.1:$(( 20000 + RANDOM % 12000 ))
            taskset -c $server_core redis-server --bind 127.0.0.1 --port "${address#*:}" --dir "$data" --appendonly yes \
                --appendfsync "$appendfsync" --save '' --daemonize no >"$data/out" &
            pids+=($!)
            for _ in $(seq 400); do grep -q 'Ready to accept' "$data/out" && break; sleep 0.05; done ;;
    esac
    if [ "$shape" = inbox ]; then
        echo "{\"requests_per_second\":$(taskset -c "$load_core" "$inbox" "$name" "$address")}"
    else
        taskset -c "$load_core" "$kurir" bench --server "$address" --protocol "$name" --connections "${shape%x*}" \
            --pipeline "${shape#*x}" --seconds "$seconds" --warm-up 0.5 --bytes 100 --rate "$rate" --json
    fi
    stop
    rm -rf "$data"
}

for shape in "${shapes[@]}"; do
    for round in $(seq "$rounds"); do
        for name in kurir redis echo; do
            [ "$shape $name" != "inbox echo" ] || continue
            # A failure ends it all: a round without a figure would be compared with another.
            report=$(measure "$name" "$shape")
            printf '%s\t%s\t%s\t%s\n' "$shape" "$round" "$name" "$report"
        done
    done
done >"$work/all"
[ -z "$json" ] || cp "$work/all" "$json"

echo "$rounds rounds of $seconds s each, --sync $sync and appendfsync $appendfsync, server on core $server_core, load on core $load_core"
echo "requests a second (medians)    kurir     redis      echo   kurir/redis   kurir/echo   p99 in us: kurir, redis"
rate() { sed -n 's/.*"requests_per_second":\([0-9.]*\).*/\1/p'; }
p99() { sed -n 's/.*"p99":\([0-9.]*\).*/\1/p'; }
median() { sort -g | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }
for shape in "${shapes[@]}"; do
    lines() { awk -F'\t' -v s="$shape" -v n="$1" '$1 == s && $3 == n { print $4 }' "$work/all"; }
    ratio() { paste <(lines "$1" | rate) <(lines "$2" | rate) | awk '{ print $1 / $2 }' | median; }
    if [ "$shape" = inbox ]; then
        printf '%-26s %9.0f %9.0f %9s %13.2f   messages read a second\n' "$shape" "$(lines kurir | rate | median)" \
            "$(lines redis | rate | median)" - "$(ratio kurir redis)"
        continue
    fi
    printf '%-26s %9.0f %9.0f %9.0f %13.2f %12.2f   %.0f, %.0f\n' "$shape" "$(lines kurir | rate | median)" \
        "$(lines redis | rate | median)" "$(lines echo | rate | median)" "$(ratio kurir redis)" "$(ratio kurir echo)" \
        "$(lines kurir | p99 | median)" "$(lines redis | p99 | median)"
done
