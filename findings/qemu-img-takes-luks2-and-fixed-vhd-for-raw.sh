#!/usr/bin/env bash
# qemu-img 7.2 (Debian bookworm; 10.0.2 does the same), cryptsetup 2.6: an image that LUKS2 or a fixed VHD is in is
# probed as raw.
#
# A good guess: what qemu-img reports as raw has no format of its own, so it is safe to serve it sector for sector; and what
# it knows as "luks" and "vpc" it recognizes.
# What happens: LUKS is recognized in version 1 only, and version 2 is what cryptsetup makes by default. A VHD is
# recognized by its first sector; a fixed one has its header in the last sector only, and qemu-img does not look there in
# what it has made itself. The disk is 512 bytes longer then than it should be.
#
# Seen: LUKS1 "luks", LUKS2 "raw"; dynamic VHD "vpc", fixed VHD "raw", of 4,194,816 bytes for a disk of 4,194,304.
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

debs qemu-utils=1:7.2+dfsg-7+deb12u18+b3 cryptsetup-bin=2:2.6.1-4~deb12u2
qemu_img() { with "$work/root/usr/bin/qemu-img" "$@"; }
cd "$work"
format() { qemu_img info "$1" | sed -n 's/^file format: //p'; }
expect() {
    local found
    found=$(format "$1")
    echo "$1: $found"
    [[ $found == "$2" ]] || changed "$1 is probed as $found, not as $2"
}
head -c 4194304 /dev/zero | tr '\0' 'x' > disk
qemu_img convert -f raw -O vpc -o subformat=fixed,force_size=on disk fixed-vhd
qemu_img convert -f raw -O vpc disk dynamic-vhd
for version in 1 2; do
    truncate -s 32M "luks$version"
    printf secret | with "$work/root/sbin/cryptsetup" -q luksFormat --type "luks$version" \
        --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "luks$version" -
    [[ $(head -c 6 "luks$version" | xxd -p) == 4c554b53babe ]] || changed "LUKS$version has another magic"
done
[[ $(tail -c 512 fixed-vhd | head -c 8) == conectix ]] || changed "a fixed VHD ends in another way"
[[ $(stat -c %s fixed-vhd) == 4194816 ]] || changed "a fixed VHD has another length"
expect luks1 luks
expect luks2 raw
expect dynamic-vhd vpc
expect fixed-vhd raw
echo "as stated: LUKS2 and a fixed VHD are taken for raw"
