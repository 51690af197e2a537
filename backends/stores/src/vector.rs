//! Lists of pieces as the vectors of system calls.

use libc::iovec;
use pvblk::memory::Piece;

// `Piece` says that it is laid out so.
const _: () = assert!(size_of::<Piece>() == size_of::<iovec>());
const _: () = assert!(align_of::<Piece>() == align_of::<iovec>());

/// The longest vector of a system call (`UIO_MAXIOV` of Linux).
pub(crate) const VECTOR_MAX: usize = 1024;

/// Memory for one system call.
#[cfg(feature = "file")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vector<'a> {
    /// A single piece.
    One(Piece),
    /// Several, at most [`VECTOR_MAX`].
    Many(&'a [Piece]),
}

/// The pieces as system calls take them.
pub(crate) fn as_iovec(pieces: &[Piece]) -> *const iovec {
    pieces.as_ptr().cast()
}

/// `piece` without its first `skip` bytes, of which it has more.
pub(crate) fn tail(piece: Piece, skip: usize) -> Piece {
    // SAFETY: it lies inside of the piece.
    Piece::new(unsafe { piece.base().add(skip) }, piece.bytes() - skip)
}

/// What comes after the first `done` bytes of `pieces`, or the beginning of that. `None` at the end.
#[cfg(feature = "file")]
#[inline]
pub(crate) fn rest(pieces: &[Piece], done: u64) -> Option<Vector<'_>> {
    let mut skip = done;
    for (index, piece) in pieces.iter().enumerate() {
        let bytes = piece.bytes() as u64;
        if skip >= bytes {
            skip -= bytes;
            continue;
        }
        let left = &pieces[index..];
        return Some(if skip > 0 {
            Vector::One(tail(*piece, skip as usize))
        } else if let [piece] = left {
            Vector::One(*piece)
        } else {
            Vector::Many(&left[..left.len().min(VECTOR_MAX)])
        });
    }
    None
}

/// Adds the `bytes` bytes after the first `skip` of `pieces` to `list`, which gets no longer than
/// [`VECTOR_MAX`]. `true` if all of them fit.
#[cfg(feature = "nbd")]
pub(crate) fn push_range(
    list: &mut std::vec::Vec<Piece>,
    pieces: &[Piece],
    mut skip: u64,
    mut bytes: u64,
) -> bool {
    for piece in pieces {
        if bytes == 0 {
            return true;
        }
        let length = piece.bytes() as u64;
        if skip >= length {
            skip -= length;
            continue;
        }
        if list.len() == VECTOR_MAX {
            return false;
        }
        let after = tail(*piece, skip as usize);
        let count = (after.bytes() as u64).min(bytes);
        list.push(Piece::new(after.base(), count as usize));
        bytes -= count;
        skip = 0;
    }
    bytes == 0
}
