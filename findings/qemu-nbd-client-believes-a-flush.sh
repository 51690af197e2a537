#!/usr/bin/env bash
# QEMU 7.2's NBD client (Debian bookworm; 10.0.2 does the same) and nbdkit 1.32: with `reconnect-delay`, a flush is
# answered with success although the server has lost acknowledged writes.
#
# A good guess: `reconnect-delay` hides a restart of the server only if nothing was lost by it; at least the next flush
# fails, for that is the one request that says what is durable.
# What happens: the connection is made again, the flush goes to the new server, which has nothing to flush and says that
# all is well. Nothing counts writes that were acknowledged and not flushed. A guest's file system believes that its
# journal is safe.
#
# Seen: 64 KiB are written, the server (nbdkit's memory plugin) is killed and started again: the flush succeeds, and the
# read finds zeroes.
set -euo pipefail
work=$(mktemp -d)
stop() { for each in $(jobs -p); do kill "$each" 2>/dev/null || true; done; wait 2>/dev/null || true; rm -rf "$work"; }
trap stop EXIT
changed() { echo "CHANGED: $*"; exit 1; }

# debs NAME=VERSION...: unpacks these Debian packages, and what they need, into $work/root.
debs() {
    local names=() needed=() each
    for each; do names+=("${each%%=*}"); done
    mapfile -t needed < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "${names[@]}" | grep -E '^[a-z]' | sort -u |
        grep -vxE "$(IFS='|'; echo "${names[*]}")|libc6|libgcc-s1|gcc-.*-base|perl.*|debconf.*|dpkg|tar|cdebconf|python3.*|libpython3.*")
    mkdir -p "$work/deb"
    (cd "$work/deb" && apt-get -qq -o APT::Sandbox::User=root download "$@" "${needed[@]}") ||
        { echo "these packages cannot be had (is 'apt-get update' due?): $*"; exit 2; }
    for each in "$work"/deb/*.deb; do dpkg -x "$each" "$work/root"; done
    libraries=$(find "$work/root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
}
start() { LD_LIBRARY_PATH=$libraries "$@" & }

debs qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1
plugin=$(find "$work/root" -name nbdkit-memory-plugin.so)
serve() {
    rm -f "$work/socket"
    start "$work/root/usr/bin/nbdkit" -f -U "$work/socket" "$plugin" 16M
    server=$!
    until [[ -S $work/socket ]]; do sleep 0.1; done
}
# until_prompt COUNT: waits until qemu-io asks for so many commands. It must not be sent two at a time: it reads both, and
# does one.
until_prompt() {
    local tries
    for ((tries = 0; tries < 3000; tries++)); do
        if (($(grep -o 'qemu-io> ' "$work/out" | wc -l) >= $1)); then return; fi
        sleep 0.1
    done
    changed "qemu-io has not answered in 300 s: $(cat "$work/out")"
}
serve
mkfifo "$work/commands"
touch "$work/out"
LD_LIBRARY_PATH=$libraries "$work/root/usr/bin/qemu-io" -t writeback "json:{\"driver\": \"raw\", \"file\": {\"driver\": \"nbd\",
    \"server\": {\"type\": \"unix\", \"path\": \"$work/socket\"}, \"reconnect-delay\": 60}}" \
    < "$work/commands" > "$work/out" 2>&1 &
client=$!
exec 9> "$work/commands"
echo 'write -P 0x5a 0 64k' >&9
until_prompt 2
grep -q 'wrote 65536/65536' "$work/out" || changed "the write failed: $(cat "$work/out")"
kill -9 "$server"
wait "$server" 2>/dev/null || true
serve
echo flush >&9
until_prompt 3
echo 'read -v 0 512' >&9
until_prompt 4
echo quit >&9
exec 9>&-
# Its exit code is that of the worst command.
wait "$client" || changed "a request has failed: $(cat "$work/out")"
grep -q '00000000: *00 00 00 00' "$work/out" || changed "the write is still there: $(cat "$work/out")"
echo "as stated: the flush succeeded, and the write is lost"
