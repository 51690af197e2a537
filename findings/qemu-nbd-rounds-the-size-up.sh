#!/usr/bin/env bash
# qemu-nbd 7.2 (Debian bookworm; 10.0.2 does the same), nbdkit 1.32: one raw file, two sizes.
#
# A good guess: the size of an export of a raw file is the size of the file, whichever server exports it; at worst it is
# rounded down to sectors, as a block device is.
# What happens: qemu-nbd rounds it *up* to 512 bytes. The missing bytes read as zeroes, and a write to the last sector
# makes the file longer, so that nbdkit, and everything that looks at the file, sees another size from then on.
#
# Seen, for a file of 1,048,676 bytes: nbdkit 1,048,676; qemu-nbd 1,049,088; after a write to the last 512 bytes through
# qemu-nbd the file has 1,049,088 bytes.
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

# The least of an NBD client: simple replies, one request at a time.
cat > "$work/nbd.py" <<'EOF'
import socket, struct, time

class Nbd:
    def __init__(self, path, name=b""):
        for attempt in range(100):
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(path)
                break
            except OSError:
                time.sleep(0.1)
        self.socket.settimeout(60)
        self.take(18)
        self.socket.sendall(struct.pack(">I", 3))
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            data = self.take(length)
            if kind == 1:
                break
            if data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:12])

    def take(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def ask(self, command, offset=0, length=0, data=b"", flags=0):
        head = struct.pack(">IHHQQI", 0x25609513, flags, command, 1, offset, length)
        self.socket.sendall(head + data)
        error = struct.unpack(">IIQ", self.take(16))[1]
        return error, self.take(length) if command == 0 and not error else b""

    def read(self, offset, length): return self.ask(0, offset, length)[1]
    def write(self, offset, data, flags=0): return self.ask(1, offset, len(data), data, flags)[0]
    def flush(self): return self.ask(3)[0]
EOF

debs qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1
cd "$work"
head -c 1048676 /dev/zero | tr '\0' 'x' > disk
# nbdkit looks for its plugins where it would be installed.
plugin=$(find "$work/root" -name nbdkit-file-plugin.so)
start "$work/root/usr/bin/nbdkit" -f -U "$work/nbdkit" "$plugin" disk
start "$work/root/usr/bin/qemu-nbd" -t -f raw -k "$work/qemu" disk
python3 - <<'EOF' || changed "see above"
import os
from nbd import Nbd
nbdkit, qemu = Nbd("nbdkit"), Nbd("qemu")
print("nbdkit", nbdkit.size, "qemu-nbd", qemu.size)
assert (nbdkit.size, qemu.size) == (1048676, 1049088)
assert qemu.read(1048576, 512) == b"x" * 100 + bytes(412)
assert os.path.getsize("disk") == 1048676
assert qemu.write(1048576, b"y" * 512) == 0 and qemu.flush() == 0
assert os.path.getsize("disk") == 1049088, os.path.getsize("disk")
EOF
echo "as stated: qemu-nbd rounds the size up, and a write makes the file longer"
