//! The wire format of XenStore (`xen/include/public/io/xs_wire.h`).

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes of payload in a message, either way.
pub(super) const PAYLOAD_MAX: usize = 4096;

/// Most bytes of a node's list of children: the names of some hundred thousand domains.
///
/// C xenstored keeps to [`PAYLOAD_MAX`] and sends a longer list in parts. oxenstored sends it as
/// one longer message, on rings of guests as well as on sockets.
pub(super) const LIST_MAX: usize = 1 << 20;

/// Longest path that begins with a slash.
const ABSOLUTE_PATH_MAX: usize = 3072;

/// Longest path that is relative to the domain's home.
const RELATIVE_PATH_MAX: usize = 2048;

/// The type of a message that no request asked for: a watch fired.
pub(super) const WATCH_EVENT: u32 = 15;

/// The type of a reply that names an error.
pub(super) const ERROR: u32 = 16;

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    /// What is asked, or answered.
    pub kind: U32,
    /// The request's number. A reply has that of its request.
    pub request: U32,
    /// The transaction's number, or 0.
    pub transaction: U32,
    /// Bytes of payload that follow.
    pub length: U32,
}

/// Bytes of a [`Header`].
pub(super) const HEADER_BYTES: usize = size_of::<Header>();

const _: () = assert!(HEADER_BYTES == 16);

/// The requests that this client makes. The discriminant is the type on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Operation {
    Directory = 1,
    Read = 2,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Write = 11,
    Mkdir = 12,
    Remove = 13,
    SetPermissions = 14,
    DirectoryPart = 22,
}

/// Whether `xenstored` gets to judge this path. What it would misread is stopped here: a NUL byte
/// would end the path early and turn its rest into a value.
pub(crate) fn is_path(path: &str) -> bool {
    let longest = if path.starts_with('/') { ABSOLUTE_PATH_MAX } else { RELATIVE_PATH_MAX };
    !path.is_empty() && path.len() <= longest && !path.contains('\0')
}

/// Reads an unsigned decimal number: digits and nothing else, no sign, no blanks, no overflow.
pub(crate) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, &byte| {
        let digit = char::from(byte).to_digit(10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    })
}

/// [`decimal`], within 32 bits.
pub(crate) fn decimal_u32(digits: &[u8]) -> Option<u32> {
    decimal(digits)?.try_into().ok()
}

/// Reads the payload of the reply to a [`Operation::TransactionStart`]: a number and a NUL byte.
/// 0 means "no transaction", so it cannot be the number of one.
pub(super) fn transaction_number(payload: &[u8]) -> Option<u32> {
    decimal_u32(payload.strip_suffix(&[0]).unwrap_or(payload)).filter(|&number| number != 0)
}
