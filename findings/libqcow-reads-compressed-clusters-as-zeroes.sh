#!/usr/bin/env bash
# libqcow 20260703 (its Python package), qcow2 images compressed by qemu-img 7.2 and 10.0.2: some clusters are read as zeroes,
# without an error.
#
# A good guess: a library that opens a compressed qcow2 image reads all of it, or reports what it cannot read.
# What happens: the first cluster is right; many of the following ones are zeroes. Compressed clusters begin at any byte and
# may begin in the middle of the sector in which the one before ends.
#
# Seen, for 64 clusters of 64 KiB, each filled with one compressible pattern: 33 of 64 are zeroes where the image is not;
# qemu-img itself converts the image back without a difference.
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
"$work/python/bin/pip" -q install --disable-pip-version-check libqcow-python==20260703 || { echo "cannot install libqcow-python==20260703"; exit 2; }
cd "$work"
python3 - <<'EOF'
import random
random.seed(1)
pages = [bytes(random.randrange(16) for _ in range(4096)) for _ in range(64)]
open("disk.raw", "wb").write(b"".join(page * 16 for page in pages))
EOF
qemu_img convert -c -O qcow2 disk.raw disk.qcow2
qemu_img convert -O raw disk.qcow2 back.raw
cmp disk.raw back.raw || changed "qemu-img does not read its own image"
python/bin/python - <<'EOF' || changed "see above"
import pyqcow
raw = open("disk.raw", "rb").read()
image = pyqcow.file()
image.open("disk.qcow2")
assert image.get_media_size() == len(raw)

def read(offset, length):
    image.seek_offset(offset, 0)
    data = b""
    while len(data) < length:
        data += image.read_buffer(length - len(data))
    return data

wrong = [at for at in range(0, len(raw), 65536) if read(at, 65536) != raw[at : at + 65536]]
zeroes = [at for at in wrong if read(at, 512) == bytes(512)]
print(len(wrong), "of", len(raw) // 65536, "clusters are wrong;", len(zeroes), "begin with zeroes")
assert wrong and zeroes == wrong, "all clusters are right, or wrong in another way"
EOF
echo "as stated: compressed clusters are read as zeroes, without an error"
