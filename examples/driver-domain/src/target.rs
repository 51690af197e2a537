//! What a disk is to be served from, as the toolstack says it: `target=` of `xl`'s `disk`.

use alloc::format;
use alloc::string::String;

use crate::settings;

/// The major number of `xvd` disks, 16 numbers each, and where the numbers of further ones begin.
const MAJOR: u32 = 202 << 8;
const EXTENDED: u32 = 1 << 28;
/// How many disks there are below that.
const NARROW: u32 = 16;

/// What a disk is to be served from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A RAM disk of the command line: `ram0`.
    Named(String),
    /// A RAM disk of its own, of so many bytes: `ram:64m`.
    Private(u64),
    /// A disk of this domain, by its virtual device number: `disk:xvdb`.
    Own(u32),
}

impl Target {
    /// Reads a target; `None` if it is none.
    pub fn parse(text: &str) -> Option<Self> {
        if settings::is_ram(text) {
            return Some(Self::Named(text.into()));
        }
        match text.split_once(':')? {
            ("ram", size) => settings::bytes(size).map(Self::Private),
            ("disk", name) => device_number(name).map(Self::Own),
            _ => None,
        }
    }
}

/// The virtual device number of a whole disk: `xvdb` is 51728.
pub fn device_number(name: &str) -> Option<u32> {
    let letters = name.strip_prefix("xvd")?;
    let is_name = (1..=3).contains(&letters.len())
        && letters.bytes().all(|letter| letter.is_ascii_lowercase());
    if !is_name {
        return None;
    }
    let index = letters.bytes().fold(0, |sum, letter| sum * 26 + u32::from(letter - b'a') + 1) - 1;
    Some(if index < NARROW { MAJOR | index << 4 } else { EXTENDED | index << 8 })
}

/// What a disk is called in this domain.
pub fn device_name(number: u32) -> String {
    let index = match number {
        _ if number & !0xF0 == MAJOR => Some((number & 0xF0) >> 4),
        _ if number & !0x0FFF_FF00 == EXTENDED => Some((number & 0x0FFF_FF00) >> 8),
        _ => None,
    };
    let Some(mut index) = index else { return format!("vbd-{number}") };
    let mut name = String::new();
    loop {
        // Below 26, so that it is a letter.
        name.insert(0, char::from(b'a' + (index % 26) as u8));
        match (index / 26).checked_sub(1) {
            Some(rest) => index = rest,
            None => return format!("xvd{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_belong_together() {
        let known = [("xvda", 51712), ("xvdb", 51728), ("xvdp", 51952), ("xvdq", 0x1000_1000)];
        for (name, number) in known {
            assert_eq!(device_number(name), Some(number), "{name}");
        }
        for name in ["xvda", "xvdp", "xvdq", "xvdz", "xvdaa", "xvdzz", "xvdaaa"] {
            assert_eq!(device_name(device_number(name).unwrap()), name);
        }
        for name in ["xvd", "xvda1", "xvdA", "sda", "xvdaaaa", "xvdé"] {
            assert_eq!(device_number(name), None, "{name}");
        }
        assert_eq!(device_name(51713), "vbd-51713");
        assert_eq!(device_name(768), "vbd-768");
    }

    #[test]
    fn targets_are_read() {
        assert_eq!(Target::parse("ram1"), Some(Target::Named("ram1".into())));
        assert_eq!(Target::parse("ram:64m"), Some(Target::Private(64 << 20)));
        assert_eq!(Target::parse("disk:xvdb"), Some(Target::Own(51728)));
        for text in ["", "ram", "ram:", "ram:0", "disk:", "disk:sda", "/dev/loop0", "file:ram1"] {
            assert_eq!(Target::parse(text), None, "{text}");
        }
    }
}
