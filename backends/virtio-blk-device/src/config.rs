//! What the device offers, and what it says of itself.

use pvblk::command::Features as DiskFeatures;
use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk_virtio::block::Config;
use pvblk_virtio::feature::Features;

/// The largest queue that there can be (VirtIO 2.7 and 2.8).
pub const QUEUE_SIZE_MAX: u16 = 1 << 15;

/// The most sectors that one range to discard, to erase or to fill with zeroes may have: 2 GiB, so
/// that no store has to count further than 32 bits of bytes. For
/// [`DeviceWire::with_range_limit`](pvblk_virtio::DeviceWire::with_range_limit).
pub const RANGE_SECTORS: u32 = 1 << 22;

/// How a device is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settings {
    /// The most queues, 1 or more.
    pub queues: u16,
    /// The most descriptors in a queue.
    pub queue_size: u16,
    /// The most segments in a request. A driver makes no chain that is longer than its queue, the
    /// header and the status included: so this should be two less than the descriptors of the queues
    /// that the monitor has, which it does not tell before the driver has read this.
    pub segments: u16,
    /// The most bytes in a segment; as many as can be written down if not set.
    pub segment_bytes: Option<u32>,
    /// Whether packed queues are offered.
    pub packed: bool,
    /// Whether writes are cached until they are flushed, before the driver says what it wants. It
    /// matters only for a disk that can be flushed.
    pub write_back: bool,
    /// How long a queue is looked at before its server sleeps, in microseconds, if there were requests
    /// lately. It answers the next one sooner, and takes processor time.
    pub look_again: u32,
    /// How long a queue that is to stop waits for its store, in milliseconds. The monitor stands still
    /// for that time. What is in progress afterwards is answered as failed.
    pub patience: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            // QEMU's `vhost-user-blk-pci` has queues of 128 descriptors, unless it is told otherwise.
            segments: 126,
            segment_bytes: None,
            packed: false,
            write_back: true,
            look_again: 0,
            patience: 10_000,
        }
    }
}

impl Settings {
    /// The features to offer for a disk. The driver accepts some of them.
    pub fn offer(&self, geometry: &Geometry, disk: &DiskFeatures) -> Features {
        let writable = !geometry.read_only;
        let discards = writable && disk.discard.is_some();
        let mut offer = Features::VERSION_1
            | Features::INDIRECT
            | Features::EVENT_INDEX
            | Features::SEG_MAX
            | Features::BLOCK_SIZE
            | Features::TOPOLOGY;
        for (wanted, feature) in [
            (self.segment_bytes.is_some(), Features::SIZE_MAX),
            (self.packed, Features::PACKED),
            (self.queues > 1, Features::MULTI_QUEUE),
            (geometry.read_only, Features::READ_ONLY),
            (disk.flush, Features::FLUSH | Features::CONFIG_WCE),
            (discards, Features::DISCARD),
            (discards && disk.secure_discard, Features::SECURE_ERASE),
            (writable && disk.write_zeroes, Features::WRITE_ZEROES),
        ] {
            offer.set(feature, wanted);
        }
        offer
    }

    /// The configuration space for a disk whose write cache is on or not. Fields of features that
    /// are not offered say nothing and are 0.
    pub fn config(&self, geometry: &Geometry, disk: &DiskFeatures, write_back: bool) -> Config {
        let offer = self.offer(geometry, disk);
        let if_offered = |feature, value| if offer.contains(feature) { value } else { 0 };
        let ratio = (geometry.physical_bytes / geometry.logical_bytes).max(1);
        let in_16_bits = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let alignment = disk.discard.map_or(1, |units| units.granularity.max(1));
        Config {
            capacity: geometry.sectors.to_le(),
            size_max: self.segment_bytes.unwrap_or(0).to_le(),
            seg_max: u32::from(self.segments).to_le(),
            block_size: geometry.logical_bytes.to_le(),
            // Below 32: it is of a number in 32 bits.
            physical_block_exponent: ratio.ilog2() as u8,
            min_io_size: in_16_bits(ratio).to_le(),
            write_back: u8::from(disk.flush && write_back),
            num_queues: self.queues.to_le(),
            max_discard_sectors: if_offered(Features::DISCARD, RANGE_SECTORS).to_le(),
            max_discard_ranges: if_offered(Features::DISCARD, 1).to_le(),
            discard_sector_alignment: if_offered(Features::DISCARD, alignment).to_le(),
            max_write_zeroes_sectors: if_offered(Features::WRITE_ZEROES, RANGE_SECTORS).to_le(),
            max_write_zeroes_ranges: if_offered(Features::WRITE_ZEROES, 1).to_le(),
            write_zeroes_may_unmap: u8::from(disk.write_zeroes && disk.discard.is_some()),
            max_secure_erase_sectors: if_offered(Features::SECURE_ERASE, RANGE_SECTORS).to_le(),
            max_secure_erase_ranges: if_offered(Features::SECURE_ERASE, 1).to_le(),
            secure_erase_sector_alignment: if_offered(Features::SECURE_ERASE, alignment).to_le(),
            ..Config::default()
        }
    }
}

/// Whether the write cache is on: what a driver that knows of it says, or else what the disk was set
/// up with. A driver that cannot flush gets none (VirtIO 5.2.5.2).
pub fn is_write_back(accepted: Features, written: bool) -> bool {
    accepted.contains(Features::FLUSH) && (written || !accepted.contains(Features::CONFIG_WCE))
}

const _: () = assert!(SECTOR_BYTES == 512, "the configuration counts in such sectors");

#[cfg(test)]
mod tests {
    use pvblk::command::DiscardUnits;

    use super::*;

    const GEOMETRY: Geometry =
        Geometry { sectors: 1 << 33, logical_bytes: 512, physical_bytes: 4096, read_only: false };

    fn all() -> DiskFeatures {
        DiskFeatures {
            flush: true,
            discard: Some(DiscardUnits { granularity: 8, alignment: 0 }),
            secure_discard: true,
            write_zeroes: true,
            ..DiskFeatures::default()
        }
    }

    #[test]
    fn a_disk_with_everything() {
        let settings = Settings { queues: 4, packed: true, ..Settings::default() };
        let offer = settings.offer(&GEOMETRY, &all());
        for feature in [
            Features::MULTI_QUEUE,
            Features::PACKED,
            Features::FLUSH,
            Features::CONFIG_WCE,
            Features::DISCARD,
            Features::SECURE_ERASE,
            Features::WRITE_ZEROES,
        ] {
            assert!(offer.contains(feature), "{feature:?}");
        }
        assert!(!offer.intersects(Features::READ_ONLY | Features::SIZE_MAX));
        let config = settings.config(&GEOMETRY, &all(), true);
        let (capacity, queues, discard) =
            (config.capacity, config.num_queues, config.max_discard_sectors);
        assert_eq!((capacity, queues, discard), (1 << 33, 4, 1 << 22));
        assert_eq!((config.physical_block_exponent, config.write_back), (3, 1));
        assert_eq!((config.write_zeroes_may_unmap, { config.discard_sector_alignment }), (1, 8));
        assert_eq!(settings.config(&GEOMETRY, &all(), false).write_back, 0);
    }

    #[test]
    fn a_read_only_disk_is_not_written_to() {
        let geometry = Geometry { read_only: true, logical_bytes: 4096, ..GEOMETRY };
        let settings = Settings { segment_bytes: Some(65536), ..Settings::default() };
        let offer = settings.offer(&geometry, &all());
        assert!(offer.contains(Features::READ_ONLY | Features::SIZE_MAX));
        let writes = Features::DISCARD | Features::SECURE_ERASE | Features::WRITE_ZEROES;
        assert!(!offer.intersects(writes | Features::MULTI_QUEUE));
        let config = settings.config(&geometry, &all(), true);
        assert_eq!((config.max_discard_ranges, config.max_write_zeroes_ranges), (0, 0));
        assert_eq!(({ config.block_size }, config.physical_block_exponent), (4096, 0));
    }

    #[test]
    fn who_has_the_say_about_the_cache() {
        let both = Features::FLUSH | Features::CONFIG_WCE;
        for (accepted, written, expected) in [
            (both, true, true),
            (both, false, false),
            (Features::FLUSH, false, true),
            (Features::CONFIG_WCE, true, false),
            (Features::empty(), true, false),
        ] {
            assert_eq!(is_write_back(accepted, written), expected, "{accepted:?} {written}");
        }
    }
}
