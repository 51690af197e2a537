//! How a disk is served: settings that have a default, a configuration file, a command line.

use pvblk_daemon::backing::{DiskOrigin, Misfit, StoreOptions};
pub use pvblk_daemon::backing::{ImageFormat, NbdDurability};
use pvblk_daemon::limit::{BURST, Limits};
use pvblk_xen::foreign::DataPath;
use serde::{Deserialize, Serialize};
use xen_blkback::{Config, Hotplug};

use crate::source::Source;

/// How a disk is served. What is not set is taken from elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct DiskOptions {
    /// Whether the guest may not write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// The logical sector in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sector: Option<u32>,
    /// The most queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u32>,
    /// The most pages of a ring, as a power of two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ring_order: Option<u32>,
    /// The most segments in one request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segments: Option<u32>,
    /// Whether the guest's pages are kept mapped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
    /// How the guest's pages are reached that are not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_path: Option<Path>,
    /// Whether a file is read and written through the page cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub buffered: Option<bool>,
    /// Whether a file is read and written by plain system calls, not by `io_uring`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synchronous: Option<bool>,
    /// Whether a file may be used by others at the same time that say the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<bool>,
    /// What a file is, whatever it looks like.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// What is done about writes that an NBD server may lose when it is restarted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_durability: Option<NbdDurability>,
    /// Whether a disk is refused whose writes cannot be made durable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub require_flush: Option<bool>,
    /// The most requests in a second; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// The most bytes in a second, read and written; 0 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps: Option<u64>,
    /// How long what these two allow may be saved up, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
    /// How long an NBD server may be at work on a write whose connection is gone, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_settle: Option<u32>,
}

/// How a guest's pages are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// Xen copies.
    Copy,
    /// They are mapped for each request.
    Map,
}

/// A setting that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadOption {
    name: &'static str,
    value: u32,
    expected: &'static str,
}

impl std::fmt::Display for BadOption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is {}: {} is expected", self.name, self.value, self.expected)
    }
}

impl std::error::Error for BadOption {}

impl DiskOptions {
    /// These settings, and `other`'s where there are none.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self {
            read_only: self.read_only.or(other.read_only),
            sector: self.sector.or(other.sector),
            queues: self.queues.or(other.queues),
            ring_order: self.ring_order.or(other.ring_order),
            segments: self.segments.or(other.segments),
            persistent: self.persistent.or(other.persistent),
            data_path: self.data_path.or(other.data_path),
            buffered: self.buffered.or(other.buffered),
            synchronous: self.synchronous.or(other.synchronous),
            share: self.share.or(other.share),
            format: self.format.or(other.format),
            nbd_durability: self.nbd_durability.or(other.nbd_durability),
            require_flush: self.require_flush.or(other.require_flush),
            iops: self.iops.or(other.iops),
            bps: self.bps.or(other.bps),
            burst: self.burst.or(other.burst),
            nbd_settle: self.nbd_settle.or(other.nbd_settle),
        }
    }

    /// The settings that `other` says differently.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let settings = |options| match serde_json::to_value(options) {
            Ok(serde_json::Value::Object(settings)) => settings,
            _ => serde_json::Map::new(),
        };
        let (ours, theirs) = (settings(self), settings(other));
        let mut names: Vec<_> = ours.keys().chain(theirs.keys()).cloned().collect();
        names.retain(|name| ours.get(name) != theirs.get(name));
        names.sort();
        names.dedup();
        names
    }

    /// Looks whether every number is one that can be served.
    ///
    /// # Errors
    ///
    /// [`BadOption`] names the first that is not.
    pub fn check(&self) -> Result<(), BadOption> {
        let bad = |name, value, expected| Err(BadOption { name, value, expected });
        match self {
            Self { sector: Some(value), .. } if !matches!(value, 512 | 1024 | 2048 | 4096) => {
                bad("sector", *value, "512, 1024, 2048 or 4096")
            }
            Self { queues: Some(value), .. } if !(1..=64).contains(value) => {
                bad("queues", *value, "1 to 64")
            }
            Self { ring_order: Some(value), .. } if *value > 4 => {
                bad("ring-order", *value, "0 to 4")
            }
            Self { segments: Some(value), .. } if *value > 4096 => {
                bad("segments", *value, "0 to 4096")
            }
            Self { nbd_settle: Some(value), .. } if *value > 3600 => {
                bad("nbd-settle", *value, "0 to 3600")
            }
            Self { burst: Some(value), .. } if *value > 60_000 => {
                let value = u32::try_from(*value).unwrap_or(u32::MAX);
                bad("burst", value, "0 to 60000")
            }
            _ => Ok(()),
        }
    }

    /// How much the disk may do.
    pub fn limits(&self) -> Limits {
        Limits {
            iops: self.iops.unwrap_or(0),
            bps: self.bps.unwrap_or(0),
            burst: self.burst.unwrap_or(BURST),
        }
    }

    /// Looks whether a disk that is served from `source` can follow these settings. They are its own:
    /// those of all disks are for the ones that they fit.
    ///
    /// # Errors
    ///
    /// [`Misfit`] names the first that it cannot.
    pub fn check_source(&self, source: &Source) -> Result<(), Misfit> {
        self.store_options(false, DiskOrigin::New).check(source)
    }

    /// What the backend is told.
    pub fn config(&self, hotplug: Hotplug) -> Config {
        let mut config = Config::default();
        config.queues = self.queues.unwrap_or(config.queues);
        config.ring_order = self.ring_order.unwrap_or(config.ring_order);
        config.indirect_segments = self.segments.unwrap_or(config.indirect_segments);
        config.persistent = self.persistent.unwrap_or(config.persistent);
        config.data_path = match self.data_path {
            Some(Path::Map) => DataPath::Map,
            Some(Path::Copy) => DataPath::Copy,
            None => config.data_path,
        };
        config.hotplug = hotplug;
        config
    }

    /// What is told to the stores.
    pub fn store_options(&self, read_only: bool, origin: DiskOrigin) -> StoreOptions {
        StoreOptions {
            read_only,
            origin,
            sector: self.sector,
            buffered: self.buffered.unwrap_or(false),
            synchronous: self.synchronous.unwrap_or(false),
            share: self.share.unwrap_or(false),
            format: self.format,
            nbd_durability: self.nbd_durability,
            nbd_settle: self.nbd_settle,
            require_flush: self.require_flush.unwrap_or(false),
            // At most 64, as was checked.
            queues: self.queues.and_then(|queues| queues.try_into().ok()).unwrap_or(1),
        }
    }

    /// The settings as one node of XenStore has them.
    pub fn to_node(&self) -> String {
        // Booleans, numbers and names: nothing that JSON could not say.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads what [`to_node`](Self::to_node) wrote.
    ///
    /// # Errors
    ///
    /// What the JSON parser says; the numbers are not [checked](Self::check).
    pub fn from_node(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_nearer_wins() {
        let near =
            DiskOptions { sector: Some(4096), persistent: Some(false), ..Default::default() };
        let far = DiskOptions { sector: Some(512), queues: Some(2), ..Default::default() };
        let both = near.or(&far);
        assert_eq!((both.sector, both.queues, both.persistent), (Some(4096), Some(2), Some(false)));
        let config = both.config(Hotplug::Script);
        assert_eq!((config.queues, config.persistent, config.ring_order), (2, false, 4));
        assert_eq!(config.hotplug, Hotplug::Script);
    }

    #[test]
    fn a_node_holds_everything() {
        let options = DiskOptions {
            read_only: Some(true),
            sector: Some(4096),
            queues: Some(1),
            ring_order: Some(0),
            segments: Some(4096),
            persistent: Some(false),
            data_path: Some(Path::Map),
            buffered: Some(true),
            synchronous: Some(true),
            share: Some(true),
            format: Some(ImageFormat::Raw),
            nbd_durability: Some(NbdDurability::WriteThrough),
            require_flush: Some(true),
            iops: Some(100),
            bps: Some(1 << 20),
            burst: Some(50),
            nbd_settle: Some(9),
        };
        assert_eq!(DiskOptions::from_node(&options.to_node()).unwrap(), options);
        assert_eq!(DiskOptions::default().to_node(), "{}");
        assert!(DiskOptions::from_node("{\"colour\": 3}").is_err());
    }

    #[test]
    fn numbers_are_checked() {
        for (options, word) in [
            (DiskOptions { sector: Some(513), ..Default::default() }, "sector"),
            (DiskOptions { queues: Some(0), ..Default::default() }, "queues"),
            (DiskOptions { ring_order: Some(5), ..Default::default() }, "ring-order"),
            (DiskOptions { segments: Some(4097), ..Default::default() }, "segments"),
            (DiskOptions { nbd_settle: Some(3601), ..Default::default() }, "nbd-settle"),
        ] {
            assert!(options.check().unwrap_err().to_string().starts_with(word));
        }
        assert_eq!(DiskOptions::default().check(), Ok(()));
    }
}
