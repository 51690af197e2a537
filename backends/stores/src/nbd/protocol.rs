//! The numbers of the NBD protocol (`doc/proto.md` of the NBD project), all big-endian.

/// Flags of the handshake, of both ends.
pub(super) mod handshake {
    pub(in crate::nbd) const FIXED_NEWSTYLE: u16 = 1;
    pub(in crate::nbd) const NO_ZEROES: u16 = 2;
}

/// Options of the handshake.
pub(super) mod option {
    pub(in crate::nbd) const EXPORT_NAME: u32 = 1;
    pub(in crate::nbd) const GO: u32 = 7;
}

/// Replies to options. The highest bit says that it is an error.
pub(super) mod reply {
    pub(in crate::nbd) const ACK: u32 = 1;
    pub(in crate::nbd) const INFO: u32 = 3;
    pub(in crate::nbd) const ERROR: u32 = 1 << 31;
    pub(in crate::nbd) const UNSUPPORTED: u32 = ERROR + 1;
    pub(in crate::nbd) const POLICY: u32 = ERROR + 2;
    pub(in crate::nbd) const TLS_REQUIRED: u32 = ERROR + 5;
    pub(in crate::nbd) const UNKNOWN: u32 = ERROR + 6;
    pub(in crate::nbd) const SHUTDOWN: u32 = ERROR + 7;
}

/// What a reply of the kind `INFO` is about.
pub(super) mod info {
    pub(in crate::nbd) const EXPORT: u16 = 0;
    pub(in crate::nbd) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export does.
pub(super) mod flag {
    pub(in crate::nbd) const READ_ONLY: u16 = 1 << 1;
    pub(in crate::nbd) const FLUSH: u16 = 1 << 2;
    pub(in crate::nbd) const FUA: u16 = 1 << 3;
    pub(in crate::nbd) const TRIM: u16 = 1 << 5;
    pub(in crate::nbd) const WRITE_ZEROES: u16 = 1 << 6;
    pub(in crate::nbd) const MULTIPLE: u16 = 1 << 8;
}

/// Commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

/// Flags of commands.
pub(super) mod command_flag {
    /// The data is durable before the reply.
    pub(in crate::nbd) const FUA: u16 = 1;
    /// Zeroes take space as other data does.
    pub(in crate::nbd) const NO_HOLE: u16 = 1 << 1;
}

/// Errors in replies: those that mean something to us.
pub(super) mod error {
    pub(in crate::nbd) const SHUTDOWN: u32 = 108;
    pub(in crate::nbd) const NOT_SUPPORTED: u32 = 95;
    pub(in crate::nbd) const INVALID: u32 = 22;
    pub(in crate::nbd) const OVERFLOW: u32 = 75;
}

pub(super) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;

/// Bytes of a request without its data.
pub(super) const REQUEST_BYTES: usize = 28;
/// Bytes of a reply without its data.
pub(super) const REPLY_BYTES: usize = 16;

/// A request, encoded.
pub(super) fn request(
    command: Command,
    flags: u16,
    cookie: u64,
    offset: u64,
    length: u32,
) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// A reply: the request's cookie, and an error or 0. `None` if it is not a simple one.
pub(super) fn parse_reply(bytes: &[u8; REPLY_BYTES]) -> Option<(u64, u32)> {
    let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = *bytes;
    let magic = u32::from_be_bytes([m0, m1, m2, m3]);
    let error = u32::from_be_bytes([e0, e1, e2, e3]);
    (magic == SIMPLE_REPLY).then(|| (u64::from_be_bytes(cookie), error))
}
