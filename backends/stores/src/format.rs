//! Formats of disk images that are not raw: found out by what a file begins and ends with.
//!
//! A store serves bytes as they are. An image of another format served so shows the guest its header
//! for a first sector, and the guest's first write destroys it.

use core::fmt;

/// How much of the beginning of an image [`probe`] looks at, in bytes.
pub const HEAD_BYTES: usize = 64 << 10;

/// How much of the end of an image [`probe`] looks at, in bytes.
pub const TAIL_BYTES: usize = 512;

/// A format that is not raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// QEMU's first format (`QFI\xfb`, version 1).
    Qcow,
    /// QEMU's format (`QFI\xfb`, version 2 and 3).
    Qcow2,
    /// QEMU's enhanced disk.
    Qed,
    /// VMware's: sparse, stream-optimised, ESX's sparse ones, or a descriptor.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Microsoft's first one, fixed (a footer) or dynamic (a copy of it in front).
    Vhd,
    /// Microsoft's second one.
    Vhdx,
    /// Linux's encryption, version 1 and 2.
    Luks,
    /// Parallels', with or without the extension for large disks.
    Parallels,
    /// Bochs' growing one.
    Bochs,
    /// A compressed loop image.
    Cloop,
    /// Apple's disk image (a trailer).
    Dmg,
}

impl Format {
    /// What it is called: in most cases what `qemu-img` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow => "qcow",
            Self::Qcow2 => "qcow2",
            Self::Qed => "QED",
            Self::Vmdk => "VMDK",
            Self::Vdi => "VDI",
            Self::Vhd => "VHD",
            Self::Vhdx => "VHDX",
            Self::Luks => "LUKS",
            Self::Parallels => "Parallels",
            Self::Bochs => "Bochs",
            Self::Cloop => "cloop",
            Self::Dmg => "DMG",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What an image begins with, and where.
const SIGNATURES: [(usize, &[u8], Format); 13] = [
    (0, b"QFI\xfb\0\0\0\x01", Format::Qcow),
    // Whatever its version is.
    (0, b"QFI\xfb", Format::Qcow2),
    (0, b"QED\0", Format::Qed),
    (0, b"KDMV", Format::Vmdk),
    (0, b"COWD", Format::Vmdk),
    // `VMDKsesparse`'s constant header: its magic in 64 bits, little-endian.
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", Format::Vmdk),
    (0x40, b"\x7f\x10\xda\xbe", Format::Vdi),
    (0, b"conectix", Format::Vhd),
    (0, b"vhdxfile", Format::Vhdx),
    (0, b"LUKS\xba\xbe", Format::Luks),
    (0, b"WithoutFreeSpace", Format::Parallels),
    (0, b"WithouFreSpacExt", Format::Parallels),
    (0, b"Bochs Virtual HD Image", Format::Bochs),
];

/// What a compressed loop image begins with: a script.
const CLOOP: &[u8] = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop";

/// The first words of a descriptor of VMware's, which may come after empty lines and comments.
const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";

/// The format of an image that is not raw, as far as that can be told.
///
/// `head` is what it begins with, up to [`HEAD_BYTES`]; `tail` are its last [`TAIL_BYTES`], or fewer of
/// a shorter one.
pub fn probe(head: &[u8], tail: &[u8]) -> Option<Format> {
    let has =
        |at: usize, words: &[u8]| head.get(at..).is_some_and(|rest: &[u8]| rest.starts_with(words));
    let begins = SIGNATURES.iter().find(|(at, words, _)| has(*at, words)).map(|found| found.2);
    begins.or_else(|| {
        if is_descriptor(head) {
            Some(Format::Vmdk)
        } else if has(0, CLOOP) {
            Some(Format::Cloop)
        } else if is_footer(tail) {
            Some(Format::Vhd)
        } else if tail.starts_with(b"koly") {
            Some(Format::Dmg)
        } else {
            None
        }
    })
}

/// Whether there is a footer of a fixed VHD: in the last 512 bytes, or 511 with old programs.
fn is_footer(tail: &[u8]) -> bool {
    tail.starts_with(b"conectix") || tail.len() == TAIL_BYTES && tail[1..].starts_with(b"conectix")
}

/// Whether this is the text that describes an image of VMware's.
fn is_descriptor(head: &[u8]) -> bool {
    let lines = head.split(|byte| *byte == b'\n').map(|line| line.trim_ascii());
    let mut lines = lines.skip_while(|line| line.is_empty() || line.starts_with(b"#!"));
    let first = lines.next().unwrap_or_default();
    first.starts_with(DESCRIPTOR)
        || first.starts_with(b"#")
            && lines
                .take_while(|line| line.is_empty() || line.starts_with(b"#"))
                .any(|line| line.starts_with(DESCRIPTOR))
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn zeroes_and_partition_tables_are_raw() {
        assert_eq!(probe(&[], &[]), None);
        assert_eq!(probe(&vec![0; HEAD_BYTES], &[0; TAIL_BYTES]), None);
        let mut head = vec![0; HEAD_BYTES];
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(probe(&head, &[0; TAIL_BYTES]), None);
        // What is not where it belongs says nothing.
        head[1..9].copy_from_slice(b"vhdxfile");
        assert_eq!(probe(&head, &[0; TAIL_BYTES]), None);
        assert_eq!(probe(b"#!/bin/sh\necho hello\n# Disk", &[]), None);
    }

    #[test]
    fn every_signature_is_found() {
        for (at, words, format) in SIGNATURES {
            let mut head = vec![0; HEAD_BYTES];
            head[at..at + words.len()].copy_from_slice(words);
            assert_eq!(probe(&head, &[0; TAIL_BYTES]), Some(format));
            // One byte less is none.
            assert_ne!(probe(&head[..at + words.len() - 1], &[]), Some(format));
        }
        for (text, format) in [
            (&b"# Disk DescriptorFile\nversion=1\n"[..], Format::Vmdk),
            (b"\n\r\n# a comment\n# Disk DescriptorFile\r\n", Format::Vmdk),
            (CLOOP, Format::Cloop),
        ] {
            assert_eq!(probe(text, &[]), Some(format));
        }
        for (at, words, format) in [
            (0, &b"conectix"[..], Format::Vhd),
            (1, b"conectix", Format::Vhd),
            (0, b"koly", Format::Dmg),
        ] {
            let mut tail = [0; TAIL_BYTES];
            tail[at..at + words.len()].copy_from_slice(words);
            assert_eq!(probe(&[0; 512], &tail), Some(format));
        }
    }
}
