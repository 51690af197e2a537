//! Compressed images, unpacked here: under emulation it would cost seconds of each boot.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;

use super::packages::Packages;

/// Magic number, the program that unpacks it, its arguments.
const FORMATS: [(&[u8], &str, &[&str]); 3] = [
    (b"\xfd7zXZ\0", "usr/bin/xz", &["-dc", "--single-stream"]),
    (b"\x28\xb5\x2f\xfd", "usr/bin/zstd", &["-dcq"]),
    (b"\x02\x21\x4c\x18", "usr/bin/lz4", &["-dcq"]),
];

/// The kernel as an ELF file, out of a `vmlinuz`; an ELF file is returned as it is.
pub fn vmlinux(packages: &Packages, image: &[u8]) -> Result<Vec<u8>> {
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_vec());
    }
    // Linux, Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    let byte = |at: usize| image.get(at).copied().context("the kernel image is too short");
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the kernel image is too short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let setup_sectors = match byte(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload =
        image.get(start..start + word(0x24c)?).context("the kernel image is cut short")?;
    let kernel = decompress(packages, payload)?;
    if !kernel.starts_with(b"\x7fELF") {
        bail!("the kernel image does not hold an ELF file");
    }
    Ok(kernel)
}

/// A file's content, decompressed if it is compressed.
pub fn read(packages: &Packages, file: &Path) -> Result<Vec<u8>> {
    let content = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    decompress(packages, &content)
}

fn decompress(packages: &Packages, data: &[u8]) -> Result<Vec<u8>> {
    if data.starts_with(b"\x1f\x8b") {
        let mut plain = Vec::new();
        // What follows the stream (the kernel's size, padding) is not an error.
        let result = MultiGzDecoder::new(data).read_to_end(&mut plain);
        return if plain.is_empty() { Err(result.unwrap_err().into()) } else { Ok(plain) };
    }
    for (magic, program, arguments) in FORMATS {
        if data.starts_with(magic) {
            return through(packages, program, arguments, data);
        }
    }
    Ok(data.to_vec())
}

fn through(packages: &Packages, program: &str, words: &[&str], data: &[u8]) -> Result<Vec<u8>> {
    let mut child = packages
        .command(program)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut input = child.stdin.take().context("no pipe")?;
    let plain = std::thread::scope(|scope| -> Result<Vec<u8>> {
        // The program may stop reading early (bytes after the stream): not our concern.
        scope.spawn(move || input.write_all(data));
        let mut plain = Vec::new();
        child.stdout.take().context("no pipe")?.read_to_end(&mut plain)?;
        Ok(plain)
    })?;
    // Its status is not asked: the kernel's build appends bytes that the programs complain of.
    child.wait()?;
    if plain.is_empty() {
        bail!("{program} could not unpack the image");
    }
    Ok(plain)
}
