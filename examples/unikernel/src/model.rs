//! What the disk must hold: for every sector, which version was written last.

use alloc::vec;
use alloc::vec::Vec;

use pvblk::memory::SharedRegion;

const WORDS: usize = 64;

/// A seeded pattern in which every sector of every version is different.
pub struct Model {
    seed: u64,
    /// The version of each sector; 0 holds zeroes: it was never written, or written with them.
    versions: Vec<u32>,
    version: u32,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(seed: u64, sectors: usize) -> Self {
        Self { seed, versions: vec![0; sectors], version: 0 }
    }

    /// Makes a new version of some sectors and puts it into `memory`.
    pub fn write(&mut self, sector: u64, sectors: u64, memory: &SharedRegion<'_>) {
        self.version += 1;
        for i in 0..sectors {
            self.versions[(sector + i) as usize] = self.version;
            let words = self.words(sector + i, self.version);
            memory.write(i as usize * 512, &words);
        }
    }

    /// Some sectors hold zeroes now.
    pub fn zero(&mut self, sector: u64, sectors: u64) {
        self.versions[sector as usize..(sector + sectors) as usize].fill(0);
    }

    /// Where `memory` differs from what the sectors must hold.
    pub fn check(&self, sector: u64, sectors: u64, memory: &SharedRegion<'_>) -> Option<u64> {
        (0..sectors).find_map(|i| {
            let words: [u64; WORDS] = memory.read(i as usize * 512);
            // Not `==`: that would call a `memcmp` that goes byte by byte without an OS's help.
            let expected = self.expected(sector + i);
            let difference = words.iter().zip(&expected).fold(0, |sum, (a, b)| sum | (a ^ b));
            (difference != 0).then_some(sector + i)
        })
    }

    /// What a sector must hold.
    pub fn expected(&self, sector: u64) -> [u64; WORDS] {
        match self.versions[sector as usize] {
            0 => [0; WORDS],
            version => self.words(sector, version),
        }
    }

    fn words(&self, sector: u64, version: u32) -> [u64; WORDS] {
        let mut state = self.seed ^ (sector << 32 | u64::from(version));
        let (first, step) = (next(&mut state), next(&mut state) | 1);
        core::array::from_fn(|i| first.wrapping_add(step.wrapping_mul(i as u64)))
    }
}

/// The next number of a sequence (splitmix64).
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
