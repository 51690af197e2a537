#!/usr/bin/env bash
# ext4-view 1.0.0 and ext4 0.9.0 (crates.io), GRUB 2.06 (Debian bookworm): space that ext4 has reserved for a file and
# that was never written is read as whatever lies there on the disk.
#
# A good guess: `fallocate` makes zeroes, and each reader of ext4 knows that; the file's length and the file system are
# in order, and `e2fsck` is content.
# What happens: such an extent is marked by 32768 added to its length. The two crates and GRUB take that for a longer extent
# of data: a reader of disk images, or a boot loader, shows old contents of the disk inside of a file. debugfs, dissect.extfs 3.15,
# libfsext 20260821, the PyPI package ext4 1.4.1, 7-Zip 25.01 and The Sleuth Kit 4.11.1 show zeroes. (rsext4 0.9.2 has a test of its own for it.)
#
# Seen: a file of 40960 bytes, all of them reserved and none written, on a disk that was full of `STALE!!` before mke2fs:
# ext4-view, ext4 and grub-fstest return `STALE!!`, debugfs zeroes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
changed() { echo "CHANGED: $*"; exit 1; }
missing() { echo "cannot be had: $*"; exit 2; }
cd "$work"

mkdir deb
(cd deb && apt-get -qq -o APT::Sandbox::User=root download e2fsprogs=1.47.0-2+b2 grub-common=2.06-13+deb12u2 \
    libdevmapper1.02.1 libext2fs2 libss2 libfreetype6 libfuse3-3) || missing "packages (is 'apt-get update' due?)"
for each in deb/*.deb; do dpkg -x "$each" root; done
LD_LIBRARY_PATH=$(find "$work/root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
export LD_LIBRARY_PATH
debugfs() { "$work/root/sbin/debugfs" "$@" 2> /dev/null; }

old() { (set +o pipefail; yes 'STALE!!' | head -c "$1"); }
old 8M > image
MKE2FS_CONFIG=root/etc/mke2fs.conf "$work/root/sbin/mke2fs" -q -F -t ext4 -b 4096 -E nodiscard image
: > empty
for each in 'write empty file' 'fallocate file 0 9' 'set_inode_field file size 40960'; do
    debugfs -w -R "$each" image > /dev/null
done
"$work/root/sbin/e2fsck" -fn image > /dev/null 2>&1 || changed "e2fsck is not content"
debugfs -R 'dump file found' image
cmp -s found <(head -c 40960 /dev/zero) || changed "debugfs does not read zeroes"

"$work/root/usr/bin/grub-fstest" image cat /file > by-grub
unset LD_LIBRARY_PATH
mkdir -p read/src
cat > read/Cargo.toml <<'EOF'
[package]
name = "read"
version = "0.0.0"
edition = "2021"
[dependencies]
anyhow = "=1.0.100"
ext4 = "=0.9.0"
ext4-view = { version = "=1.0.0", features = ["std"] }
EOF
cat > read/src/main.rs <<'EOF'
use std::fs::{self, File};
use std::io::Read;

fn main() -> anyhow::Result<()> {
    let view = ext4_view::Ext4::load(Box::new(fs::read("image")?))?;
    fs::write("by-ext4-view", view.read("/file")?)?;
    let other = ext4::SuperBlock::new(File::open("image")?)?;
    let inode = other.load_inode(other.resolve_path("/file")?.inode)?;
    let mut bytes = Vec::new();
    other.open(&inode)?.read_to_end(&mut bytes)?;
    Ok(fs::write("by-ext4", bytes)?)
}
EOF
cargo build -q --manifest-path read/Cargo.toml || missing "the crates"
read/target/debug/read
for each in ext4-view ext4 grub; do
    cmp -s "by-$each" <(old 40960) || changed "$each does not read what lies there"
done
echo "as stated: ext4-view, ext4 and GRUB read what was on the disk before, debugfs reads zeroes"
