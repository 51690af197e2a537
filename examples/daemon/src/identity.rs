//! What a disk is served from, so that it can be told from others.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use anyhow::{Context, Result};
use rustix::fs::{major, minor};
use sha2::{Digest, Sha256};

use crate::source::Source;

impl Source {
    /// A text that no other disk has: a file's is its inode, a device's its number, everything else's its
    /// name. A volume that was made under the number of another one is not told from that.
    ///
    /// # Errors
    ///
    /// If there is no such file.
    pub fn identity(&self) -> Result<String> {
        let Self::File(path) = self else { return Ok(self.to_string()) };
        let place = || format!("cannot inspect {}", path.display());
        let metadata = fs::metadata(path).with_context(place)?;
        let number = |device| format!("{}:{}", major(device), minor(device));
        Ok(match metadata.file_type().is_block_device() {
            true => format!("device {}", number(metadata.rdev())),
            false => format!("file {} of device {}", metadata.ino(), number(metadata.dev())),
        })
    }
}

/// The serial number of a disk with that [identity](Source::identity): 20 characters, always the same.
pub fn serial(identity: &str) -> String {
    let digest = Sha256::digest(identity);
    let digits: String = digest.iter().take(7).map(|byte| format!("{byte:02x}")).collect();
    format!("pvblk-{digits}")
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
        let of = |path: &std::path::Path| Source::File(path.into()).identity().unwrap();
        let (one, other) = (of(&first), of(&second));
        assert!(one.starts_with("file ") && one != other, "{one}, {other}");
        // Its content and its name may change.
        fs::write(&first, "12").unwrap();
        fs::rename(&first, folder.path().join("c")).unwrap();
        assert_eq!(of(&folder.path().join("c")), one);
        fs::rename(&second, &first).unwrap();
        assert_eq!(of(&first), other);
        assert!(Source::File("/nonexistent".into()).identity().is_err());
        assert_eq!("memory:1M".parse::<Source>().unwrap().identity().unwrap(), "memory:1M");
    }

    #[test]
    fn serial_numbers_differ_and_stay() {
        assert_eq!(serial("file 3 of device 8:1"), "pvblk-fd8300c29b256d");
        assert_ne!(serial("file 3 of device 8:1"), serial("file 4 of device 8:1"));
        assert_eq!(serial("").len(), 20);
    }
}
