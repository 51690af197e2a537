#!/usr/bin/env bash
# ext4 0.9.0 (crates.io): of a directory of several blocks only what is in the first one is listed and found, without an error.
#
# A good guess: a directory that is listed with "Ok" is listed wholly.
# What happens: with metadata checksums (mke2fs's default) each block of a directory ends with an entry that is none: inode 0,
# and a checksum behind it. The crate takes it for the end of the directory. All that follows is missing, in lists, in walks, and
# for `resolve_path`, which says that the name "isn't there".
#
# Seen: 300 files in one directory, blocks of 1 KiB: 29 of 302 entries; with blocks of 64 KiB, where all of them are in one: 302.
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

mkdir tree/many
for number in {0000..0299}; do echo "$number" > "tree/many/file-with-a-long-name-$number"; done
for size in 1024 65536; do
    tool mke2fs -q -F -t ext4 -b $size -d tree image-$size 64M 2> said || changed "mke2fs: $(cat said)"
    tool e2fsck -fn image-$size > /dev/null 2>&1 || changed "e2fsck is not content with blocks of $size"
done

mkdir -p read/src
cat > read/Cargo.toml <<'EOF'
[package]
name = "read"
version = "0.0.0"
edition = "2021"
[dependencies]
ext4 = "=0.9.0"
EOF
cat > read/src/main.rs <<'EOF'
fn main() {
    for size in [1024, 65536] {
        let disk = ext4::SuperBlock::new(std::fs::File::open(format!("image-{size}")).unwrap()).unwrap();
        let many = disk.load_inode(disk.resolve_path("/many").unwrap().inode).unwrap();
        let ext4::Enhanced::Directory(entries) = disk.enhance(&many).unwrap() else { panic!() };
        let found = disk.resolve_path("/many/file-with-a-long-name-0299").is_ok();
        println!("blocks of {size}: {} of 302 entries, the last file is found: {found}", entries.len());
    }
}
EOF
cargo build -q --manifest-path read/Cargo.toml || missing "the crates"
read/target/debug/read | tee said
diff - said <<'EOF' || changed "see above"
blocks of 1024: 29 of 302 entries, the last file is found: false
blocks of 65536: 302 of 302 entries, the last file is found: true
EOF
echo "as stated: the rest of a directory is missing"
