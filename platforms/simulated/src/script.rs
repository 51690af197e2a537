//! Decisions that are taken from bytes, for fuzz targets and for the tests that run them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::Random;

/// Decisions, taken from bytes; all zero when there are no more.
#[derive(Clone, Debug)]
pub struct Script {
    bytes: Box<[u8]>,
    at: usize,
}

impl Script {
    /// Decisions that follow from these bytes.
    pub fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.into(), at: 0 }
    }

    /// Whether there are no more bytes.
    pub fn is_over(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// What was not used yet.
    fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some(byte) = self.rest().first().copied() else { return 0 };
        self.at += 1;
        byte
    }

    /// A number below `bound`, of at most 256.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound.max(1)
    }

    /// True once in `n`, and not when there are no more bytes.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// A number of two bytes.
    pub fn number16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// A number. Small ones take one byte, others five.
    pub fn number32(&mut self) -> u32 {
        match self.byte() {
            0xFF => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
            small => small.into(),
        }
    }

    /// Two of those.
    pub fn number64(&mut self) -> u64 {
        u64::from(self.number32()) | u64::from(self.number32()) << 32
    }

    /// Up to `most` bytes. The next byte says how many.
    pub fn some(&mut self, most: usize) -> Vec<u8> {
        let count = usize::from(self.byte()).min(most).min(self.rest().len());
        let some = self.rest()[..count].to_vec();
        self.at += count;
        some
    }

    /// A seed for what is decided elsewhere; it uses no byte.
    pub fn seed(&self) -> u64 {
        self.rest().iter().fold(self.rest().len() as u64, |seed, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(*byte))
        })
    }
}

/// Runs a fuzz target on the inputs that were worth keeping, in the order of their names, and on no
/// input at all.
///
/// # Panics
///
/// If the target fails on one of them, which is named, or if there are fewer than 20.
pub fn run_corpus(folder: &Path, target: impl Fn(&[u8])) {
    let entries = std::fs::read_dir(folder);
    let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    assert!(files.len() >= 20, "{} holds {} inputs", folder.display(), files.len());
    for file in files {
        let bytes = std::fs::read(&file).expect("a file that can be read");
        attempt(&target, &bytes, format_args!("{}", file.display()));
    }
    target(&[]);
}

/// Runs a fuzz target on inputs of up to `longest` bytes that follow from their seeds.
///
/// # Panics
///
/// If the target fails on one of them; its seed is told.
pub fn run_random(seeds: impl IntoIterator<Item = u64>, longest: usize, target: impl Fn(&[u8])) {
    for seed in seeds {
        let mut random = Random::new(seed);
        let length = random.index(longest);
        let bytes: Vec<_> = (0..length).map(|_| random.number() as u8).collect();
        attempt(&target, &bytes, format_args!("seed {seed}"));
    }
}

fn attempt(target: impl Fn(&[u8]), bytes: &[u8], name: std::fmt::Arguments<'_>) {
    let result = catch_unwind(AssertUnwindSafe(|| target(bytes)));
    assert!(result.is_ok(), "{name} fails");
}
