//! What the tests of the engines share: a memory that punishes mistakes, two fake wires, patterns.

#![allow(dead_code, reason = "every test file uses a part of it")]

pub mod back;
pub mod memory;
pub mod wire;

/// Numbers that look random and are the same every time.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        ((self.number() >> 11) % end.max(1) as u64) as usize
    }
}

/// Bytes that look random, and differ from seed to seed and from sector to sector.
pub fn pattern(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed + 1);
    let sector: Vec<u8> = (0..64).flat_map(|_| random.number().to_le_bytes()).collect();
    let mut pattern = sector.repeat(bytes.div_ceil(512));
    for (number, sector) in pattern.chunks_mut(512).enumerate() {
        sector[..8].copy_from_slice(&(number as u64 ^ seed << 32).to_le_bytes());
    }
    pattern.truncate(bytes);
    pattern
}
