#!/usr/bin/env bash
# ext4-view 1.0.0 (crates.io): file systems as ext2 and ext3 are, which it says it reads, are loaded, and then called corrupt.
#
# A good guess: what `Ext4::load` takes, it can read; and "corrupt" means that the file system is not in order.
# What happens, with `e2fsck` content each time:
#  * Inodes of 128 bytes, which mke2fs made by default until 2008 and makes on request today: the file system loads, and each
#    read ends with "inode 2 is truncated".
#  * Files that are mapped by blocks (no extents): one with a hole so long that an indirect block is missing ends with
#    "invalid read of length 1024 from block 0". Short holes are read as zeroes.
#
# Seen: as above; the same files on a file system with extents and inodes of 256 bytes are read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
changed() { echo "CHANGED: $*"; exit 1; }
missing() { echo "cannot be had: $*"; exit 2; }
cd "$work"

mkdir deb tree
(cd deb && apt-get -qq -o APT::Sandbox::User=root download e2fsprogs=1.47.0-2+b2 libext2fs2 libss2) ||
    missing "packages (is 'apt-get update' due?)"
for each in deb/*.deb; do dpkg -x "$each" root; done
libraries=$work/root/lib/x86_64-linux-gnu:$work/root/usr/lib/x86_64-linux-gnu
tool() { LD_LIBRARY_PATH=$libraries MKE2FS_CONFIG=root/etc/mke2fs.conf "root/sbin/$1" "${@:2}"; }

echo hello > tree/short
truncate -s 5000000 tree/hole
echo end >> tree/hole
make() { # NAME OPTIONS...
    tool mke2fs -q -F -t ext4 -b 1024 -d tree "${@:2}" "$1" 16M
    tool e2fsck -fn "$1" > /dev/null 2>&1 || changed "e2fsck is not content with $1"
}
make new
make old -I 128
make blocks -O ^extents,^64bit

mkdir -p read/src
cat > read/Cargo.toml <<'EOF'
[package]
name = "read"
version = "0.0.0"
edition = "2021"
[dependencies]
ext4-view = { version = "=1.0.0", features = ["std"] }
EOF
cat > read/src/main.rs <<'EOF'
use ext4_view::Ext4;

fn main() {
    for image in ["new", "old", "blocks"] {
        let disk = Ext4::load(Box::new(std::fs::read(image).unwrap())).unwrap();
        for file in ["short", "hole"] {
            let said = match disk.read(format!("/{file}").as_str()) {
                Ok(bytes) if bytes == std::fs::read(format!("tree/{file}")).unwrap() => "right".into(),
                Ok(bytes) => format!("wrong, {} bytes", bytes.len()),
                Err(error) => error.to_string(),
            };
            println!("{image}, {file}: {said}");
        }
    }
}
EOF
cargo build -q --manifest-path read/Cargo.toml || missing "the crates"
read/target/debug/read | tee said
diff - said <<'EOF' || changed "see above"
new, short: right
new, hole: right
old, short: corrupt filesystem: inode 2 is truncated: size=128
old, hole: corrupt filesystem: inode 2 is truncated: size=128
blocks, short: right
blocks, hole: corrupt filesystem: invalid read of length 1024 from block 0 (originally 0) at offset 0
EOF
echo "as stated: called corrupt, and e2fsck is content"
