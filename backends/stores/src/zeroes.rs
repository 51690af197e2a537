//! Memory that holds zeroes, to write them to what cannot be told to make some.

use core::ptr::NonNull;

use pvblk::memory::Piece;

const CHUNK_BYTES: usize = 64 << 10;
const CHUNKS: usize = 16;

/// Aligned to whatever direct access may demand.
#[repr(align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

static CHUNK: Chunk = Chunk([0; CHUNK_BYTES]);

/// The same zeroes over and over. They may only be read.
pub(crate) static ZEROES: [Piece; CHUNKS] =
    [Piece::new(NonNull::from_ref(&CHUNK.0).cast(), CHUNK_BYTES); CHUNKS];

/// How many bytes [`ZEROES`] are.
#[cfg(feature = "nbd")]
pub(crate) const ZEROES_BYTES: u32 = (CHUNKS * CHUNK_BYTES) as u32;

/// Up to `left` bytes of zeroes, for one system call. `None` if there are none left to write.
#[cfg(feature = "file")]
pub(crate) fn zeroes(left: u64) -> Option<crate::vector::Vector<'static>> {
    use crate::vector::Vector;
    let [chunk, ..] = ZEROES;
    // No more than a few.
    let whole = (left / CHUNK_BYTES as u64).min(CHUNKS as u64) as usize;
    match (whole, left) {
        (0, 0) => None,
        (0, _) => Some(Vector::One(Piece::new(chunk.base(), left as usize))),
        _ => Some(Vector::Many(&ZEROES[..whole])),
    }
}
