//! What the command line says.

use alloc::string::String;
use alloc::vec::Vec;

use pvblk_xen::foreign::DataPath;
use xen_blkback::Config;

/// How this domain serves.
#[derive(Debug)]
pub struct Settings {
    /// How every vbd is served.
    pub config: Config,
    /// RAM disks that are there from the start: name and size in bytes.
    pub ram: Vec<(String, u64)>,
    /// The logical sector of RAM disks in bytes: 512 or 4096.
    pub sector: u32,
    /// Words that say nothing to us.
    pub unknown: Vec<String>,
}

impl Settings {
    /// Reads words like `ram0=64m segments=256 path=map`. What makes no sense is in
    /// [`unknown`](Self::unknown), and changes nothing.
    pub fn parse(line: &str) -> Self {
        let mut settings =
            Self { config: Config::default(), ram: Vec::new(), sector: 512, unknown: Vec::new() };
        for word in line.split_ascii_whitespace() {
            let known = word.split_once('=').is_some_and(|(key, value)| settings.set(key, value));
            if !known {
                settings.unknown.push(word.into());
            }
        }
        // A frontend may use any reference of its table for what it wants to be kept.
        let config = &mut settings.config;
        config.kept_references = config.kept_references.max(config.kept_pages.saturating_mul(2));
        // A request is taken when there is room for the longest one: others are to fit beside that.
        config.room += config.indirect_segments;
        settings
    }

    fn set(&mut self, key: &str, value: &str) -> bool {
        let Self { config, ram, sector, .. } = self;
        let number = value.parse::<u32>().ok();
        match (key, number, value) {
            ("segments", Some(segments @ 0..=4096), _) => config.indirect_segments = segments,
            ("queues", Some(queues @ 1..=64), _) => config.queues = queues,
            ("order", Some(order @ 0..=4), _) => config.ring_order = order,
            ("kept", Some(pages @ ..=1_000_000), _) => config.kept_pages = pages,
            ("persistent", Some(flag @ 0..=1), _) => config.persistent = flag == 1,
            ("path", _, "copy") => config.data_path = DataPath::Copy,
            ("path", _, "map") => config.data_path = DataPath::Map,
            ("sector", Some(bytes @ (512 | 4096)), _) => *sector = bytes,
            // For the logger.
            ("log", ..) => {}
            _ if is_ram(key) && ram.iter().all(|(name, _)| name != key) => match bytes(value) {
                Some(bytes) => ram.push((key.into(), bytes)),
                None => return false,
            },
            _ => return false,
        }
        true
    }
}

/// Whether that is the name of a RAM disk: `ram0`, `ram17`.
pub fn is_ram(name: &str) -> bool {
    let digits = name.strip_prefix("ram").unwrap_or("");
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// A size like `64m`, in bytes: a whole number of pages, and not nothing. The unit is `k`, `m` or
/// `g`, large or small, or none for bytes.
pub fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        _ => return None,
    };
    let bytes = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes > 0 && bytes.is_multiple_of(4096)).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_others_told() {
        let line = "ram0=64m ram12=1G ram0=4k segments=4096 order=0 queues=2 kept=140000 path=map \
                    persistent=0 sector=4096 log=debug segments=5000 ram=1m ramx=1m quiet ram3=5";
        let settings = Settings::parse(line);
        assert_eq!(settings.ram, [("ram0".into(), 64 << 20), ("ram12".into(), 1 << 30)]);
        assert_eq!(
            settings.unknown,
            ["ram0=4k", "segments=5000", "ram=1m", "ramx=1m", "quiet", "ram3=5"]
        );
        let config = settings.config;
        assert_eq!((config.indirect_segments, config.ring_order, config.queues), (4096, 0, 2));
        assert_eq!((config.kept_pages, config.kept_references), (140_000, 280_000));
        assert_eq!((config.data_path, config.persistent), (DataPath::Map, false));
        assert_eq!(settings.sector, 4096);
    }

    #[test]
    fn sizes_are_whole_pages() {
        assert_eq!(bytes("24M"), Some(24 << 20));
        assert_eq!(bytes("8192"), Some(8192));
        for text in ["", "m", "0", "0g", "1", "3t", "1mm", "-1m", "99999999999g", "1 m"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }
}
