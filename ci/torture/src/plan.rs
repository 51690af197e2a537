//! What a seed stands for.

use pvblk_simulated::Random;

/// How requests travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Wire {
    /// VirtIO's split queues
    Split,
    /// VirtIO's packed queues
    Packed,
    /// Xen's rings
    Blkif,
}

/// A program that serves NBD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// QEMU's.
    Qemu,
    /// `nbdkit`, with its `file` plugin.
    Nbdkit,
    /// The same, with a delay before each write.
    Slow,
}

/// What the daemon is told about a server's death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The first flush after it fails.
    Reported,
    /// Every write is made durable.
    WriteThrough,
    /// It loses nothing.
    Trusted,
}

/// What the disk is served from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A file, whose ways are chosen anew in each life.
    File,
    /// A file, with the daemon in a control group that writes slowly.
    Throttled,
    /// A file in memory.
    Memory,
    /// A loop device.
    Block,
    /// A loop device on a file system with no room for all of it.
    Full,
    /// A server.
    Nbd(Program, Durability),
}

impl Medium {
    /// The name that it is chosen by, and known failures are listed by.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Throttled => "throttled",
            Self::Memory => "memory",
            Self::Block => "block",
            Self::Full => "full",
            Self::Nbd(Program::Qemu, Durability::Reported) => "qemu-nbd-reported",
            Self::Nbd(Program::Qemu, Durability::WriteThrough) => "qemu-nbd-write-through",
            Self::Nbd(Program::Qemu, Durability::Trusted) => "qemu-nbd-trusted",
            Self::Nbd(Program::Nbdkit, Durability::Reported) => "nbdkit-reported",
            Self::Nbd(Program::Nbdkit, Durability::WriteThrough) => "nbdkit-write-through",
            Self::Nbd(Program::Nbdkit, Durability::Trusted) => "nbdkit-trusted",
            Self::Nbd(Program::Slow, Durability::Reported) => "nbdkit-slow-reported",
            Self::Nbd(Program::Slow, Durability::WriteThrough) => "nbdkit-slow-write-through",
            Self::Nbd(Program::Slow, Durability::Trusted) => "nbdkit-slow-trusted",
        }
    }
}

/// Everything about a seed that does not change from life to life.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides the rest.
    pub seed: u64,
    /// How requests travel.
    pub wire: Wire,
    /// Queues.
    pub queues: u16,
    /// What the disk is served from.
    pub medium: Medium,
    /// The logical sector, in bytes.
    pub sector_bytes: u32,
    /// The size in logical sectors. It is small, so that requests meet.
    pub sectors: u64,
    /// Whether data is at addresses that are no multiple of the sector; with blkif, of the page.
    pub misaligned: bool,
    /// Whether memory has a name, where it can have one.
    pub named: bool,
    /// Lives of the daemon.
    pub lives: u32,
}

impl Plan {
    /// What this seed stands for; with a medium and a wire that are asked for, if they are.
    pub fn new(seed: u64, only: Option<Medium>, wire: Option<Wire>) -> Self {
        // Of its own, so that a seed is otherwise what it was before there was blkif.
        let mut of_blkif = Random::new(seed ^ 0x62_6c6b_6966);
        let (is_blkif, named) = (of_blkif.one_in(2), of_blkif.one_in(2));
        let mut random = Random::new(seed);
        let virtio = if random.one_in(2) { Wire::Split } else { Wire::Packed };
        let wire = wire.unwrap_or(if is_blkif { Wire::Blkif } else { virtio });
        let queues = 1 + random.below(2) as u16;
        let medium = MEDIA[weighted(&mut random)].0;
        let medium = only.unwrap_or(medium);
        let has_sector = !matches!(medium, Medium::Nbd(..) | Medium::Block | Medium::Full);
        let sector_bytes = if has_sector && random.one_in(4) { 4096 } else { 512 };
        let sectors = 256 + random.below(3) * 384;
        let misaligned = random.one_in(3);
        let lives = match medium {
            Medium::Throttled => 4,
            Medium::Full => 3,
            _ => 8,
        };
        Self { seed, wire, queues, medium, sector_bytes, sectors, misaligned, named, lives }
    }

    /// The disk's size in bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors * u64::from(self.sector_bytes)
    }
}

use Durability::{Reported, Trusted, WriteThrough};

/// Every medium, and how often it is chosen.
pub const MEDIA: [(Medium, u64); 14] = [
    (Medium::File, 8),
    (Medium::Throttled, 2),
    (Medium::Memory, 4),
    (Medium::Block, 4),
    (Medium::Full, 2),
    (Medium::Nbd(Program::Qemu, Reported), 2),
    (Medium::Nbd(Program::Qemu, WriteThrough), 2),
    (Medium::Nbd(Program::Qemu, Trusted), 2),
    (Medium::Nbd(Program::Nbdkit, Reported), 1),
    (Medium::Nbd(Program::Nbdkit, WriteThrough), 1),
    (Medium::Nbd(Program::Nbdkit, Trusted), 1),
    (Medium::Nbd(Program::Slow, Reported), 1),
    (Medium::Nbd(Program::Slow, WriteThrough), 1),
    (Medium::Nbd(Program::Slow, Trusted), 1),
];

fn weighted(random: &mut Random) -> usize {
    let mut at = random.below(MEDIA.iter().map(|(_, weight)| weight).sum());
    MEDIA
        .iter()
        .position(|(_, weight)| {
            let is_it = at < *weight;
            at = at.saturating_sub(*weight);
            is_it
        })
        .unwrap_or(0)
}
