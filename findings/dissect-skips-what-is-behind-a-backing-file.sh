#!/usr/bin/env bash
# dissect.hypervisor 3.21, a qcow2 image whose backing file is smaller than itself: what neither holds is skipped, and what
# comes after it moves to the front.
#
# A good guess: an overlay that was made larger than its backing file reads as zeroes behind that, as the qcow2 specification
# has it, and what was written there is read from where it was written.
# What happens: a range behind the backing file's end that the overlay does not hold returns no bytes, without an error. A
# read over such a range returns fewer bytes, with the data behind the range moved forward into it. A copy made so has its
# data in the wrong places, although the size that the library reports is the right one.
#
# Seen: an overlay of 8 MiB on a backing file of 4 MiB, with 64 KiB written at 8,323,072: `size` is 8,388,608, `read()` returns
# 4,259,840 bytes, with those 64 KiB at 4,194,304; a read of 1,024 bytes at 8,322,560 returns 512, which are those of
# 8,323,072. qemu-img 7.2 and 10.0.2 convert the image to 8 MiB.
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

debs qemu-utils=1:7.2+dfsg-7+deb12u18+b3
qemu_img() { with "$work/root/usr/bin/qemu-img" "$@"; }
qemu_io() { with "$work/root/usr/bin/qemu-io" "$@" > "$work/out"; }
python3 -m venv "$work/python"
"$work/python/bin/pip" -q install --disable-pip-version-check dissect.hypervisor==3.21 dissect.util==3.24 dissect.cstruct==4.7 || { echo "cannot install dissect.hypervisor==3.21 dissect.util==3.24 dissect.cstruct==4.7"; exit 2; }
cd "$work"
qemu_img create -q -f qcow2 base.qcow2 4M
qemu_io -c 'write -P 0x66 0 4M' base.qcow2
qemu_img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 8M
qemu_io -c 'write -P 0x77 1M 4k' -c 'write -P 0x55 8323072 64k' top.qcow2
qemu_img convert -O raw top.qcow2 top.raw
python/bin/python - <<'EOF' || changed "see above"
from pathlib import Path
from dissect.hypervisor.disk.qcow2 import QCow2
raw = open("top.raw", "rb").read()
assert len(raw) == 8 << 20 and raw[-1] == 0x55
disk = QCow2(Path("top.qcow2").absolute()).open()
data = disk.read()
disk.seek(8322560)
some = disk.read(1024)
print("size", disk.size, "read", len(data), "at 8,322,560", len(some))
assert disk.size == 8 << 20
assert data == raw[: 4 << 20] + raw[8323072:], "read() returns something else"
assert raw[8322560 : 8322560 + 1024] == bytes(512) + b"\x55" * 512 and some == b"\x55" * 512, "the part is right"
EOF
echo "as stated: the hole behind the backing file is skipped, and data has moved"
