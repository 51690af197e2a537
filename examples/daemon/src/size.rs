//! Sizes as people write them: `64M`, `2GiB`, `1048576`.

use std::fmt;
use std::str::FromStr;

use pvblk::extent::SECTOR_BYTES;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The size of a disk: a number of bytes, whole sectors of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(u64);

impl Size {
    /// So many bytes.
    ///
    /// # Errors
    ///
    /// [`BadSize`] unless they are at least one whole sector.
    pub fn from_bytes(bytes: u64) -> Result<Self, BadSize> {
        let whole = bytes > 0 && bytes.is_multiple_of(SECTOR_BYTES.into());
        if whole { Ok(Self(bytes)) } else { Err(BadSize(bytes.to_string())) }
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// In sectors of 512 bytes.
    pub fn sectors(self) -> u64 {
        self.0 / u64::from(SECTOR_BYTES)
    }
}

/// A text that is no size of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSize(String);

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not the size of a disk: a number of bytes is expected, a multiple of 512, \
             with K, M, G or T for powers of 1024",
            self.0
        )
    }
}

impl std::error::Error for BadSize {}

impl FromStr for Size {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(end);
        let shift = match unit {
            "" | "B" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            _ => return Err(BadSize(text.into())),
        };
        let number: Option<u64> = digits.parse().ok();
        let bytes = number.and_then(|number| number.checked_mul(1 << shift));
        bytes.and_then(|bytes| Self::from_bytes(bytes).ok()).ok_or_else(|| BadSize(text.into()))
    }
}

impl fmt::Display for Size {
    /// In the largest unit that leaves no rest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        let unit = units.into_iter().find(|(shift, _)| self.0.trailing_zeros() >= *shift);
        let (shift, name) = unit.unwrap_or((0, ""));
        write!(f, "{}{name}", self.0 >> shift)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes, again) in [
            ("512", 512, "512"),
            ("1024", 1024, "1K"),
            ("64M", 64 << 20, "64M"),
            ("64MiB", 64 << 20, "64M"),
            ("3g", 3 << 30, "3G"),
            ("2048K", 2 << 20, "2M"),
            ("2T", 2 << 40, "2T"),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!((size.bytes(), &*size.to_string()), (bytes, again), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "0", "M", "-1", "1.5G", "100", "64MB", "64 M", "99999999999T"] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains("powers of 1024"), "{text}: {error}");
        }
    }
}
