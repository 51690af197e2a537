//! The names of a guest's disks, and the numbers that XenStore has for them
//! (`docs/man/xen-vbd-interface.7` of Xen).

use std::fmt;
use std::str::FromStr;

/// The major number of `xvd` disks on Linux, and of `sd` disks.
const XVD: u32 = 202;
const SD: u32 = 8;
/// Those of the two IDE channels, two disks each.
const IDE: [u32; 2] = [3, 22];
/// Says that a number is of the long form.
const LONG: u32 = 1 << 28;

/// A disk of a guest: `xvda` is 51712.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualDevice(pub u32);

/// A text that names no disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadDevice(String);

impl fmt::Display for BadDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a disk of a guest: xvda, xvdb1, sda, hdc or a number is expected",
            self.0
        )
    }
}

impl std::error::Error for BadDevice {}

impl FromStr for VirtualDevice {
    type Err = BadDevice;

    fn from_str(text: &str) -> Result<Self, BadDevice> {
        let bad = || BadDevice(text.into());
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return text.parse().map(Self).map_err(|_| bad());
        }
        let (kind, rest) = ["xvd", "sd", "hd"]
            .into_iter()
            .find_map(|kind| Some((kind, text.strip_prefix(kind)?)))
            .ok_or_else(bad)?;
        let end = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
        let (letters, digits) = rest.split_at(end);
        let disk = disk_number(letters).ok_or_else(bad)?;
        let partition = match digits {
            "" => 0,
            _ if digits.starts_with('0') => return Err(bad()),
            _ => digits.parse().map_err(|_| bad())?,
        };
        number(kind, disk, partition).map(Self).ok_or_else(bad)
    }
}

/// The place of a disk: `a` is 0, `z` 25, `aa` 26.
fn disk_number(letters: &str) -> Option<u32> {
    let digit = |number: u32, letter: u8| Some(number * 26 + u32::from(letter - b'a') + 1);
    if letters.is_empty() || letters.len() > 4 {
        return None;
    }
    Some(letters.bytes().try_fold(0, digit)? - 1)
}

fn disk_letters(mut disk: u32) -> String {
    let mut letters = Vec::new();
    loop {
        // Below 26.
        letters.push(char::from(b'a' + (disk % 26) as u8));
        match disk / 26 {
            0 => break letters.iter().rev().collect(),
            rest => disk = rest - 1,
        }
    }
}

fn number(kind: &str, disk: u32, partition: u32) -> Option<u32> {
    match kind {
        "xvd" if disk < 16 && partition < 16 => Some(XVD << 8 | disk << 4 | partition),
        "xvd" if disk < 1 << 20 && partition < 256 => Some(LONG | disk << 8 | partition),
        "sd" if disk < 16 && partition < 16 => Some(SD << 8 | disk << 4 | partition),
        "hd" if disk < 4 && partition < 64 => {
            Some(IDE[disk as usize / 2] << 8 | (disk % 2) << 6 | partition)
        }
        _ => None,
    }
}

impl fmt::Display for VirtualDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (self.0 >> 8, self.0 & 0xff);
        let (kind, disk, partition) = match major {
            _ if self.0 & LONG != 0 => ("xvd", (self.0 & !LONG) >> 8, minor),
            XVD => ("xvd", minor >> 4, minor & 15),
            SD => ("sd", minor >> 4, minor & 15),
            3 | 22 if minor < 128 => ("hd", minor >> 6 | u32::from(major == 22) << 1, minor & 63),
            _ => return write!(f, "{}", self.0),
        };
        write!(f, "{kind}{}", disk_letters(disk))?;
        if partition > 0 { write!(f, "{partition}") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvdb", 51728),
            ("xvda1", 51713),
            ("xvdp15", 202 << 8 | 15 << 4 | 15),
            ("xvdq", 1 << 28 | 16 << 8),
            ("xvda16", 1 << 28 | 16),
            ("xvdz", 1 << 28 | 25 << 8),
            ("xvdaa", 1 << 28 | 26 << 8),
            ("xvdab3", 1 << 28 | 27 << 8 | 3),
            ("sda", 2048),
            ("sdb2", 2048 + 18),
            ("hda", 768),
            ("hdb", 768 + 64),
            ("hdc", 5632),
            ("hdd1", 5632 + 65),
        ] {
            assert_eq!(name.parse(), Ok(VirtualDevice(number)), "{name}");
            assert_eq!(VirtualDevice(number).to_string(), name);
        }
        assert_eq!("51712".parse(), Ok(VirtualDevice(51712)));
        assert_eq!(VirtualDevice(7).to_string(), "7");
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        for text in
            ["", "xvd", "xvdA", "xvda01", "vda", "hde", "sdq", "xvda256", "xvdaaaaa", "4294967296"]
        {
            assert!(text.parse::<VirtualDevice>().is_err(), "{text}");
        }
    }
}
