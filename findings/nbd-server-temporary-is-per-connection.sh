#!/usr/bin/env bash
# nbd-server 3.24 (Debian bookworm): an export with `temporary = true` is a file of its own for each connection, and is
# announced with CAN_MULTI_CONN.
#
# A good guess: the manual says that such an export does not outlive nbd-server, so it lives as long as that; and
# CAN_MULTI_CONN means that what one connection has written and flushed, the others read.
# What happens: two connections at the same time have different disks. After a reconnection everything is zeroes, what was
# written with FUA and flushed included, and no request ever fails.
#
# Seen: flags HAS_FLAGS SEND_FLUSH SEND_FUA SEND_WRITE_ZEROES CAN_MULTI_CONN; a write with FUA and a flush on one
# connection, a flush and a read on a second one: zeroes; a third one, after the first has gone: zeroes.
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

debs nbd-server=1:3.24-1.1
cat > "$work/config" <<EOF
[generic]
    unixsock = $work/socket
    allowlist = true
[disk]
    exportname = $work/disk
    temporary = true
    filesize = 1048576
    flush = true
    fua = true
EOF
# It goes into the background by itself.
with "$work/root/bin/nbd-server" -C "$work/config" -p "$work/pid" > "$work/out" 2>&1
stop_server() { kill "$(cat "$work/pid")" 2>/dev/null || true; stop; }
trap stop_server EXIT
cd "$work"
python3 - <<'EOF' || changed "see above"
from nbd import Nbd
one, two = Nbd("socket", b"disk"), Nbd("socket", b"disk")
assert one.flags & 0x100, "CAN_MULTI_CONN is not announced"
assert one.write(0, b"Z" * 512, flags=1) == 0 and one.flush() == 0 and two.flush() == 0
assert one.read(0, 512) == b"Z" * 512
assert two.read(0, 512) == bytes(512), "the second connection sees the write"
one.socket.close()
assert Nbd("socket", b"disk").read(0, 512) == bytes(512), "the third connection sees the write"
EOF
echo "as stated: CAN_MULTI_CONN, and each connection has a disk of its own"
