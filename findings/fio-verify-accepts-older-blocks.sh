#!/usr/bin/env bash
# fio 3.33 (Debian bookworm): verification by a later run accepts blocks that are older than the last write.
#
# A good guess: write a disk with `verify=crc32c`, kill something, then run `rw=read` or `verify_only=1` with the same
# verification and seed, and every block that is not what was written last is found.
# What happens: a block's header holds the seed of the run that wrote it, but a run that writes nothing itself does not
# compare it (`verify_header_seed` is off for it unless it is set). The checksum of an old block fits the old block. So a
# write that was acknowledged and lost, with the version before it still there, passes.
#
# Seen: half of all blocks are put back to the version before.
#   rw=read:                            exit 0
#   verify_only=1:                      exit 0
#   either, with verify_header_seed=1:  exit 1
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
with() { LD_LIBRARY_PATH=$libraries "$@"; }

debs fio=3.33-3
cd "$work"
fio() {
    with "$work/root/usr/bin/fio" --name=job --filename="$work/disk" --size=8m --bs=4k --ioengine=psync \
        --verify=crc32c --output="$work/out" "$@" > "$work/err" 2>&1
}
fio --rw=randwrite --do_verify=0 --randseed=1
cp "$work/disk" "$work/older"
fio --rw=randwrite --do_verify=0 --randseed=2
for ((block = 0; block < 2048; block += 2)); do
    echo "$block"
done | xargs -I{} dd if="$work/older" of="$work/disk" bs=4k seek={} skip={} count=1 conv=notrunc status=none
cmp -s -n 4096 "$work/disk" "$work/older" || changed "the test itself"

fio --rw=read --randseed=2 || changed "rw=read finds the older blocks"
fio --rw=randwrite --verify_only=1 --randseed=2 || changed "verify_only=1 finds the older blocks"
for how in "--rw=read" "--rw=randwrite --verify_only=1"; do
    # shellcheck disable=SC2086
    if fio $how --randseed=2 --verify_header_seed=1; then changed "verify_header_seed=1 does not find them"; fi
done
echo "as stated: 1024 of 2048 blocks are older than the last write, and only verify_header_seed=1 finds that"
