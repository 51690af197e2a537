//! What a disk is served from, so that it can be told from another one in its place.
//!
//! The vbd keeps it in XenStore while a guest is connected, and a later daemon serves nothing else to
//! that guest.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use anyhow::{Context, Result, bail};
use rustix::fs::{major, minor};

use crate::backing::Backing;
use crate::opening::{NamedMemory, Opening};
use crate::runtime::Runtime;
use crate::source::Source;

/// What a disk is served from, opened.
#[derive(Debug)]
pub struct Opened {
    /// The disk.
    pub backing: Backing,
    /// What no other disk has that could be in its place.
    pub identity: String,
}

/// Opens `source`, and says what it is.
///
/// # Errors
///
/// Whatever is wrong, with what to do about it.
pub fn open(
    opening: &Opening,
    source: &Source,
    runtime: &Runtime,
    named: &NamedMemory,
) -> Result<Opened> {
    // Before and after: a file that is exchanged meanwhile is not taken for the other one. What
    // cannot be looked at cannot be opened either, and that error says more.
    let before = identity(source).ok();
    let backing = opening.open(source, runtime, named)?;
    let identity = identity(source)?;
    if before.as_ref() != Some(&identity) {
        bail!("{source} was exchanged for another one while it was opened");
    }
    Ok(Opened { backing, identity })
}

/// A file by its inode, a device by its number, everything else by its name. A volume that was made
/// under the number of another one is not told from that.
fn identity(source: &Source) -> Result<String> {
    let Source::File(path) = source else { return Ok(source.to_string()) };
    let place = || format!("cannot inspect {}", path.display());
    let metadata = fs::metadata(path).with_context(place)?;
    let number = |device| format!("{}:{}", major(device), minor(device));
    Ok(match metadata.file_type().is_block_device() {
        true => format!("device {}", number(metadata.rdev())),
        false => format!("file {} of device {}", metadata.ino(), number(metadata.dev())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_its_identity_and_a_copy_has_another() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second] = ["a", "b"].map(|name| folder.path().join(name));
        fs::write(&first, "1").unwrap();
        fs::write(&second, "1").unwrap();
        let of = |path: &std::path::Path| identity(&Source::File(path.into())).unwrap();
        let (one, other) = (of(&first), of(&second));
        assert!(one.starts_with("file ") && one != other, "{one}, {other}");
        // Its content and its name may change.
        fs::write(&first, "12").unwrap();
        fs::rename(&first, folder.path().join("c")).unwrap();
        assert_eq!(of(&folder.path().join("c")), one);
        fs::rename(&second, &first).unwrap();
        assert_eq!(of(&first), other);
        assert!(identity(&Source::File("/nonexistent".into())).is_err());
        assert_eq!(identity(&"memory:1M".parse().unwrap()).unwrap(), "memory:1M");
    }
}
