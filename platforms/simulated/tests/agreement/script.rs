//! Scripts, and what they come to on a vector of bytes.

use std::hash::{DefaultHasher, Hasher};

use proptest::prelude::*;
use pvblk::extent::ExtentError;
use pvblk::frontend::{IoError, SubmitError};

/// The disk: 4 MiB.
pub const SECTORS: u64 = 8192;

/// The most sectors of a request.
pub const LARGEST: u64 = 5000;

/// A sector that cannot be read.
pub const BAD: u64 = 6_789;

/// The unit in which the disk discards, in sectors.
pub const UNIT: u64 = 8;

/// A range of sectors, on the disk or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    pub first: u64,
    pub count: u64,
}

/// In which memory the data of a request are.
#[derive(Clone, Debug)]
pub enum Memory {
    /// That stays shared, as far as it is large enough.
    Registered,
    /// That is lent for the request.
    Owned,
    /// Several pieces, cut after so many sectors each, taken from either.
    List(Vec<u64>),
}

#[derive(Clone, Debug)]
pub enum Step {
    Read {
        area: Area,
        memory: Memory,
    },
    Write {
        area: Area,
        memory: Memory,
        seed: u64,
    },
    Discard(Area),
    WriteZeroes {
        area: Area,
        may_unmap: bool,
    },
    Flush,
    /// Lets both ends work for so many turns.
    Turns(u8),
    /// The peer goes away, and another one of the same disk comes.
    Reset,
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// A digest of what was read.
    Data(u64),
    Refused(SubmitError),
    Failed(IoError),
}

/// What a script comes to.
pub struct Expected {
    pub outcomes: Vec<Outcome>,
    pub disk: Vec<u8>,
}

fn areas() -> impl Strategy<Value = Area> {
    let count = prop_oneof![
        8 => 1..=16_u64,
        4 => 1..=256_u64,
        2 => 256..=2048_u64,
        1 => 2048..=LARGEST,
        1 => Just(0),
    ];
    (0..SECTORS + 64, count).prop_map(|(first, count)| {
        // Most of them keep to the disk.
        let first = if first < SECTORS { first.min(SECTORS.saturating_sub(count)) } else { first };
        Area { first, count }
    })
}

fn memories() -> impl Strategy<Value = Memory> {
    prop_oneof![
        4 => Just(Memory::Registered),
        2 => Just(Memory::Owned),
        2 => prop::collection::vec(1..40_u64, 1..6).prop_map(Memory::List),
    ]
}

/// Scripts of up to so many steps.
pub fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (areas(), memories()).prop_map(|(area, memory)| Step::Read { area, memory }),
        8 => (areas(), memories(), any::<u64>())
            .prop_map(|(area, memory, seed)| Step::Write { area, memory, seed }),
        2 => areas().prop_map(Step::Discard),
        2 => (areas(), any::<bool>())
            .prop_map(|(area, may_unmap)| Step::WriteZeroes { area, may_unmap }),
        1 => Just(Step::Flush),
        4 => (1..6_u8).prop_map(Step::Turns),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 1..most)
}

impl Area {
    /// Whether it is one of the disk's.
    pub fn check(&self) -> Result<(), SubmitError> {
        match self.first.checked_add(self.count) {
            _ if self.count == 0 => Err(ExtentError::Empty.into()),
            Some(end) if end <= SECTORS => Ok(()),
            _ => Err(ExtentError::OutOfRange.into()),
        }
    }

    pub fn bytes(&self) -> usize {
        self.count as usize * 512
    }

    /// Where it is on the disk, in bytes.
    pub fn range(&self) -> std::ops::Range<usize> {
        let first = self.first as usize * 512;
        first..first + self.bytes()
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.first < other.first + other.count && other.first < self.first + self.count
    }

    /// The whole units of discarding in it.
    fn units(&self) -> Self {
        let first = self.first.next_multiple_of(UNIT);
        let end = (self.first + self.count) / UNIT * UNIT;
        Self { first, count: end.saturating_sub(first) }
    }
}

impl Step {
    /// The sectors that it is about.
    pub fn area(&self) -> Option<Area> {
        match self {
            Self::Read { area, .. }
            | Self::Write { area, .. }
            | Self::Discard(area)
            | Self::WriteZeroes { area, .. } => Some(*area),
            Self::Flush | Self::Turns(_) | Self::Reset => None,
        }
    }

    /// Whether it changes them.
    pub fn changes(&self) -> bool {
        !matches!(self, Self::Read { .. })
    }
}

/// Bytes that tell where they belong and which version they are.
pub fn pattern(area: Area, seed: u64) -> Vec<u8> {
    let words = (area.first * 64..(area.first + area.count) * 64)
        .map(|word| (word ^ seed << 24).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed);
    words.flat_map(u64::to_le_bytes).collect()
}

pub fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Plays a script on a vector of bytes.
pub fn model(steps: &[Step]) -> Expected {
    let mut disk = vec![0; SECTORS as usize * 512];
    let outcomes = steps.iter().map(|step| outcome(step, &mut disk)).collect();
    Expected { outcomes, disk }
}

fn outcome(step: &Step, disk: &mut [u8]) -> Outcome {
    if let Some(area) = step.area()
        && let Err(error) = area.check()
    {
        return Outcome::Refused(error);
    }
    match step {
        Step::Read { area, .. } if area.overlaps(&Area { first: BAD, count: 1 }) => {
            return Outcome::Failed(IoError::Device);
        }
        Step::Read { area, .. } => return Outcome::Data(digest(&disk[area.range()])),
        Step::Write { area, seed, .. } => {
            disk[area.range()].copy_from_slice(&pattern(*area, *seed));
        }
        Step::Discard(area) => disk[area.units().range()].fill(0),
        Step::WriteZeroes { area, .. } => disk[area.range()].fill(0),
        Step::Flush | Step::Turns(_) | Step::Reset => {}
    }
    Outcome::Done
}
