#!/usr/bin/env bash
# QEMU 7.2 (Debian bookworm), machine microvm: a virtio-blk device that was given `queue-size=16` offers 1024 descriptors
# by its memory-mapped registers, and segments for a queue of 16.
#
# A good guess: QueueNumMax (VirtIO 1.2, 4.2.2) is the size that the queue was given, as the queue_size of a PCI device is; and
# `seg_max` belongs to the queue that is offered.
# What happens: QueueNumMax is 1024 for every queue size, while seg_max is the size that was asked for, less 2. So a small
# queue cannot be tried with this transport: a driver that takes what is offered has 1024 descriptors, and requests of 2
# segments. A driver that derives one from the other is wrong in either direction.
#
# Seen: queue-size 4, 16, 128, 256, 1024: QueueNumMax 1024 each time; seg_max 2, 14, 126, 254, 1022.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
changed() { echo "CHANGED: $*"; exit 1; }

# debs NAME=VERSION...: unpacks these Debian packages, and what they need and this system does not have, into $work/root.
debs() {
    local names=() needed=() each
    for each; do names+=("${each%%=*}"); done
    mapfile -t needed < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "${names[@]}" | grep -E '^[a-z]' | sort -u |
        grep -vxE "$(IFS='|'; echo "${names[*]}")|libc6|libgcc-s1|gcc-.*-base|perl.*|debconf.*|dpkg|tar|cdebconf|python3.*|libpython3.*")
    for each in "${!needed[@]}"; do
        dpkg -s "${needed[each]}" > "$work/status" 2>&1 && unset "needed[each]"
    done
    mkdir -p "$work/deb"
    (cd "$work/deb" && apt-get -qq -o APT::Sandbox::User=root download "$@" "${needed[@]}") ||
        { echo "these packages cannot be had (is 'apt-get update' due?): $*"; exit 2; }
    for each in "$work"/deb/*.deb; do dpkg -x "$each" "$work/root"; done
    libraries=$(find "$work/root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
}

debs "qemu-system-x86=1:7.2+dfsg-7+deb12u18+b2"
truncate -s 1M "$work/disk"
# The guest never runs: QEMU's own test protocol reads and writes the registers.
cat > "$work/ask.py" <<'EOF'
import os, subprocess, sys
root, libraries, disk = sys.argv[1:]

def offered(size):
    words = [f"{root}/usr/bin/qemu-system-x86_64", "-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios",
        "-M", "microvm", "-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-qtest", "stdio", "-qtest-log", "/dev/null",
        "-global", "virtio-mmio.force-legacy=false", "-drive", f"file={disk},if=none,id=d,format=raw",
        "-device", f"virtio-blk-device,drive=d,queue-size={size}"]
    qemu = subprocess.Popen(words, env=dict(os.environ, LD_LIBRARY_PATH=libraries), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(line):
        print(line, file=qemu.stdin, flush=True)
        for answer in qemu.stdout:
            if answer.startswith("OK"):
                return answer.split()[1:]
        raise SystemExit("QEMU has gone")

    def register(address):
        return int(ask(f"readl {address:#x}")[0], 16)

    try:
        for transport in range(24):
            base = 0xFEB00000 + transport * 0x200
            # "virt", and a block device.
            if (register(base), register(base + 8)) == (0x74726976, 2):
                ask(f"writel {base + 0x30:#x} 0")
                return register(base + 0x34), register(base + 0x100 + 12)
        raise SystemExit("there is no block device")
    finally:
        qemu.kill()
        qemu.wait()

for size in (4, 16, 128, 256, 1024):
    most, segments = offered(size)
    print(f"queue-size {size}: QueueNumMax {most}, seg_max {segments}")
    assert (most, segments) == (1024, size - 2), "that has changed"
EOF
python3 "$work/ask.py" "$work/root" "$libraries" "$work/disk" || changed "see above"
echo "as stated: the size of the queue is not what is offered"
