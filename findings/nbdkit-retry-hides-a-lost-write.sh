#!/usr/bin/env bash
# nbdkit 1.32's retry filter in front of its nbd plugin (Debian bookworm): a flush is answered with success although the
# server behind it has lost acknowledged writes.
#
# A good guess: the filter tries requests again until they succeed, so what a client was told holds; a flush that cannot be
# done for the writes before it fails.
# What happens: the flush fails on the dead connection, the filter opens the plugin again, which connects to the new server,
# and that one has nothing to flush and says that all is well. A client that keeps books about lost connections cannot know
# it: its own connection, to the filter, was never lost.
#
# Seen: a write, the server behind is killed and started again, a flush: error 0; a read: zeroes; all on one connection.
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

debs nbdkit=1.32.5-1
cd "$work"
memory=$(find "$work/root" -name nbdkit-memory-plugin.so)
nbd=$(find "$work/root" -name nbdkit-nbd-plugin.so)
retry=$(find "$work/root" -name nbdkit-retry-filter.so)
python3 - "$work/root/usr/bin/nbdkit" "$memory" "$nbd" "$retry" "$libraries" <<'EOF' || changed "see above"
import os, subprocess, sys
from nbd import Nbd
nbdkit, memory, plugin, retry, libraries = sys.argv[1:]
os.environ["LD_LIBRARY_PATH"] = libraries

def serve(socket, *words):
    return subprocess.Popen([nbdkit, "-f", "-U", socket, *words])

behind = serve("behind", memory, "16M")
Nbd("behind").socket.close()
front = serve("front", f"--filter={retry}", plugin, "socket=behind", "retries=10", "retry-delay=1")
try:
    client = Nbd("front")
    assert client.write(0, b"Z" * 512) == 0 and client.read(0, 512) == b"Z" * 512
    behind.kill()
    behind.wait()
    os.remove("behind")
    behind = serve("behind", memory, "16M")
    Nbd("behind").socket.close()
    assert client.flush() == 0, "the flush fails"
    assert client.read(0, 512) == bytes(512), "the write is still there"
finally:
    front.kill()
    behind.kill()
EOF
echo "as stated: the flush succeeded, and the write is lost"
