//! Contents that say which write they are of.
//!
//! Each 512 bytes are 64 words, little endian: a magic number with the history's, the version, the
//! place on the disk (in units of 512 bytes), the writer, and 60 words that follow from those. So no
//! part of one write passes for another, nor a sector for its neighbour.

use crate::event::{Seen, Version, Writer};

/// The unit that is tagged, in bytes.
pub const UNIT_BYTES: usize = 512;

const MAGIC: u64 = 0x7076_626c_0000_0000;
const HEAD: usize = 4;

fn mix(mut word: u64) -> u64 {
    word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[index * 8..][..8]);
    u64::from_le_bytes(word)
}

/// The words of a unit with this head.
fn words(head: [u64; HEAD]) -> impl Iterator<Item = u64> {
    let seed = head.iter().fold(0, |seed, word| mix(seed ^ word));
    head.into_iter().chain((HEAD as u64..UNIT_BYTES as u64 / 8).map(move |at| mix(seed ^ at << 32)))
}

/// Fills `bytes`, which begin at sector `first` of `sector_bytes` each, as a write of this version
/// does.
///
/// # Panics
///
/// If `bytes` is not a number of units.
pub fn fill(
    history: u32,
    writer: Writer,
    version: Version,
    first: u64,
    sector_bytes: usize,
    bytes: &mut [u8],
) {
    assert!(bytes.len().is_multiple_of(UNIT_BYTES), "{} bytes are no sectors", bytes.len());
    let place = first * (sector_bytes / UNIT_BYTES) as u64;
    for (place, unit) in (place..).zip(bytes.chunks_exact_mut(UNIT_BYTES)) {
        let head = [MAGIC | u64::from(history), version, place, writer.into()];
        for (bytes, word) in unit.chunks_exact_mut(8).zip(words(head)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// What one sector shows, which is as long as `bytes`.
pub fn read(history: u32, sector: u64, bytes: &[u8]) -> Seen {
    let place = sector * (bytes.len() / UNIT_BYTES) as u64;
    let units = (place..).zip(bytes.chunks_exact(UNIT_BYTES));
    let mut units = units.map(|(place, unit)| read_unit(history, place, unit));
    let first = units.next().unwrap_or(Seen::Zeroes);
    units.fold(first, |all, one| if all == one { all } else { Seen::Mixed })
}

fn read_unit(history: u32, place: u64, unit: &[u8]) -> Seen {
    let head: [u64; HEAD] = core::array::from_fn(|index| word(unit, index));
    if unit.iter().all(|&byte| byte == 0) {
        Seen::Zeroes
    } else if head[0] != MAGIC | u64::from(history) {
        Seen::Foreign
    } else if words(head).enumerate().any(|(index, expected)| word(unit, index) != expected) {
        Seen::Mixed
    } else if head[2] != place {
        Seen::Misplaced
    } else {
        Seen::Version(head[1])
    }
}
