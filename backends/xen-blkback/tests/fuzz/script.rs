//! Decisions, taken from bytes.

use super::raw::Seg;

/// Decisions; all zero when there are no more bytes.
pub struct Script<'a> {
    bytes: &'a [u8],
}

impl<'a> Script<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        *first
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.byte()) % bound.max(1)
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    /// Small numbers take one byte, others five.
    pub fn number32(&mut self) -> u32 {
        match self.byte() {
            0xFF => u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()]),
            small => small.into(),
        }
    }

    /// A seed for what is decided elsewhere.
    pub fn seed(&self) -> u64 {
        self.bytes.iter().fold(self.bytes.len() as u64, |seed, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(*byte))
        })
    }

    pub fn number64(&mut self) -> u64 {
        u64::from(self.number32()) | u64::from(self.number32()) << 32
    }

    /// Up to `most` bytes.
    pub fn some(&mut self, most: usize) -> &'a [u8] {
        let count = usize::from(self.byte()).min(most).min(self.bytes.len());
        let (some, rest) = self.bytes.split_at(count);
        self.bytes = rest;
        some
    }

    /// A segment, of one of the references, or of another one; most are sound.
    pub fn segment(&mut self, references: &[u32]) -> Seg {
        let choice = self.below(64);
        let reference = match references.get(choice % (references.len() + 1)) {
            Some(reference) => *reference,
            None => self.number32(),
        };
        let (first, last) = match self.byte() {
            0..128 => (0, 7),
            bits @ 128..192 => (bits % 8, 7),
            bits @ 192..240 => (bits % 8, bits / 8 % 8),
            _ => (self.byte(), self.byte()),
        };
        (reference, first, last)
    }
}
