//! What the benches of this project run: one client loop for each driver, and a fake peer that
//! answers it.
//!
//! Everything is made so that *only the driver's side* can be counted. A bench is a sequence of
//! rounds; in a round the client takes every completion that is there, checks it, reuses its buffer
//! for the next random place on the disk, and shows the new requests to the peer. That is one
//! function that is never inlined, and callgrind counts inside it and nowhere else. The peer answers
//! between two rounds.

pub mod allocations;
pub mod blkback;
pub mod blkif;
pub mod callgrind;
pub mod client;
pub mod device;
pub mod driver;
pub mod nothing;
pub mod rust_vmm;
pub mod threads;
pub mod virtio;
pub mod virtio_guest;
pub mod virtqueue;

/// Requests of a bench, after the first few that fill the queue. A multiple of every depth.
pub const REQUESTS: u64 = 9_600;

/// The size of the disk in sectors of 512 bytes: 1 TiB.
pub const DISK_SECTORS: u64 = 1 << 31;

/// What a run did besides executing instructions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Requests that were completed.
    pub requests: u64,
    /// Notifications that the driver sent.
    pub notifications: u64,
    /// Allocations of the driver's side.
    pub allocations: u64,
}

/// Random places on the disk: a linear congruential generator, cheap enough not to be what is
/// measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random(u64);

impl Random {
    /// A random first sector of a request; `mask` is what [`alignment`] says for its size.
    #[inline(always)]
    pub fn sector(&mut self, mask: u64) -> u64 {
        // Knuth's MMIX; the upper bits are the random ones.
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) & mask
    }
}

/// The mask that aligns a sector to requests of `sectors` (a power of two) sectors.
pub fn alignment(sectors: u32) -> u64 {
    !(u64::from(sectors) - 1)
}

const _: () = assert!(DISK_SECTORS == 1 << (64 - 33));
