//! Slots and indirect entries of blkif, byte for byte.
//!
//! From `xen/include/public/io/blkif.h`. There are two layouts: the 64-bit one, which x86_64 and
//! both Arm architectures use, and the one of 32-bit x86, whose `uint64_t` is aligned to 4 bytes.
//! A third name, "native", is whichever of the two the backend itself uses. All fields are little
//! endian on every architecture that Xen runs on.
//!
//! Requests and responses share their slots; the stride is the size of the request. Sectors are
//! always of 512 bytes, in `sector_number` as in `first_sect` and `last_sect`.

use core::mem::offset_of;

use pvblk::memory::{PAGE_BYTES, SharedRegion, Word};
use pvblk::plan::Segment;
use zerocopy::little_endian::{I16, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, transmute};

use crate::platform::GrantRef;

/// `BLKIF_OP_*`: what a request asks.
pub mod operation {
    /// Read sectors.
    pub const READ: u8 = 0;
    /// Write sectors.
    pub const WRITE: u8 = 1;
    /// Write sectors (or none) between all earlier and all later requests.
    pub const WRITE_BARRIER: u8 = 2;
    /// Make completed writes durable.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Give up the contents of sectors.
    pub const DISCARD: u8 = 5;
    /// A read or write whose segments are in pages of their own.
    pub const INDIRECT: u8 = 6;
    /// Nothing that blkif has.
    pub const NONE: u8 = u8::MAX;
}

/// `BLKIF_DISCARD_SECURE`: erase every copy.
pub const DISCARD_SECURE: u8 = 1;

/// `BLKIF_RSP_*`: how a request went.
pub mod status {
    /// Done.
    pub const OKAY: i16 = 0;
    /// Failed.
    pub const ERROR: i16 = -1;
    /// The backend does not do this.
    pub const EOPNOTSUPP: i16 = -2;
}

/// `BLKIF_MAX_SEGMENTS_PER_REQUEST`: segments that fit in a slot.
pub const DIRECT_SEGMENTS: usize = 11;

/// `BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`: indirect pages that a slot can name.
pub const INDIRECT_PAGES: usize = 8;

/// Entries in one indirect page.
pub const ENTRIES_PER_PAGE: usize = 512;

/// The most segments that one request can have.
pub const INDIRECT_SEGMENTS: usize = INDIRECT_PAGES * ENTRIES_PER_PAGE;

/// `blkif_request_segment`: a range of sectors in a granted page, in a slot or an indirect page.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SegmentEntry {
    gref: U32,
    /// First sector in the page, 0 to 7.
    first_sect: u8,
    /// Last sector in the page, inclusive, 0 to 7.
    last_sect: u8,
    pad: U16,
}

const _: () = assert!(size_of::<SegmentEntry>() == 8);

impl SegmentEntry {
    /// The entry for a segment that lies in one page.
    #[inline(always)]
    pub fn new(segment: Segment<GrantRef>) -> Self {
        let first_sect = (segment.offset / 512) as u8;
        let last_sect = ((segment.offset + segment.bytes) / 512) as u8 - 1;
        Self { gref: U32::new(segment.handle.0), first_sect, last_sect, pad: U16::ZERO }
    }

    /// The entry as a word of memory.
    #[inline(always)]
    pub fn to_words(self) -> [u64; 1] {
        transmute!(self)
    }
}

/// What a segment entry cannot say: sectors outside of the page, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a segment of sectors that no page has")]
pub struct BadSegment;

/// The upper half of an entry that covers a whole page.
const WHOLE_PAGE: u64 = 7 << 40;

impl SegmentEntry {
    /// An entry for nothing.
    pub const EMPTY: Self = Self { gref: U32::ZERO, first_sect: 0, last_sect: 0, pad: U16::ZERO };

    /// The reference, if the entry is for a whole page; otherwise a number that is no reference.
    #[inline(always)]
    pub fn whole_page(self) -> u64 {
        let [word] = self.to_words();
        u64::from_le(word) ^ WHOLE_PAGE
    }

    /// The entry that a word of memory holds.
    #[inline(always)]
    pub fn from_word(word: u64) -> Self {
        transmute!(word)
    }

    /// The segment, if it is one: `0 <= first <= last <= 7`. The padding may hold anything.
    ///
    /// # Errors
    ///
    /// [`BadSegment`].
    #[inline(always)]
    pub fn segment(self) -> Result<Segment<GrantRef>, BadSegment> {
        let Self { gref, first_sect: first, last_sect: last, .. } = self;
        if first > last || last > 7 {
            return Err(BadSegment);
        }
        Ok(Segment {
            handle: GrantRef(gref.get()),
            offset: u32::from(first) * 512,
            bytes: u32::from(last - first + 1) * 512,
        })
    }
}

/// The part of a request that comes first in all of them, copied out of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// One of [`operation`], or anything.
    pub operation: u8,
    /// The byte after it: the number of segments, the flag of a discard, or the inner operation of
    /// an indirect request.
    pub detail: u8,
    /// The next two bytes: the number of segments of an indirect request.
    pub indirect_segments: u16,
    /// To be echoed in the response.
    pub id: u64,
    /// The first sector.
    pub sector: u64,
}

/// The pages of a ring: the backend has them where its platform maps them.
#[derive(Clone, Copy, Debug)]
pub struct RingPages<'a, R: Fn(usize) -> SharedRegion<'a>>(pub R);

/// Where requests are copied out of.
pub trait Slots {
    /// Copies `N` words out, once.
    fn read<T: Word, const N: usize>(&self, at: usize) -> [T; N];

    /// Copies `N` words out, once, for each place of `into`.
    #[inline(always)]
    fn read_list<T: Word, U, const N: usize>(
        &self,
        at: usize,
        into: &mut [U],
        decode: impl Fn([T; N]) -> U,
    ) {
        for (place, item) in into.iter_mut().enumerate() {
            *item = decode(self.read(at + place * N * size_of::<T>()));
        }
    }
}

impl<'a, R: Fn(usize) -> SharedRegion<'a>> Slots for RingPages<'a, R> {
    /// A slot may lie in two pages, but no word does.
    #[inline(always)]
    fn read<T: Word, const N: usize>(&self, at: usize) -> [T; N] {
        if at % PAGE_BYTES + N * size_of::<T>() <= PAGE_BYTES {
            return (self.0)(at / PAGE_BYTES).read(at % PAGE_BYTES);
        }
        core::array::from_fn(|i| {
            let at = at + i * size_of::<T>();
            let [word] = (self.0)(at / PAGE_BYTES).read(at % PAGE_BYTES);
            word
        })
    }

    #[inline(always)]
    fn read_list<T: Word, U, const N: usize>(
        &self,
        at: usize,
        into: &mut [U],
        decode: impl Fn([T; N]) -> U,
    ) {
        let each = N * size_of::<T>();
        if at % PAGE_BYTES + into.len() * each <= PAGE_BYTES {
            return (self.0)(at / PAGE_BYTES).read_list(at % PAGE_BYTES, into, decode);
        }
        for (place, item) in into.iter_mut().enumerate() {
            *item = decode(self.read(at + place * each));
        }
    }
}

impl<S: Slots> Slots for &S {
    #[inline(always)]
    fn read<T: Word, const N: usize>(&self, at: usize) -> [T; N] {
        S::read(self, at)
    }
}

/// One slot of a ring, of which every word that is copied out is written down as well.
pub(crate) struct Noted<'n, S> {
    /// The ring.
    pub ring: S,
    /// Where the slot begins there.
    pub at: usize,
    /// Where it is written down, from the beginning.
    pub note: SharedRegion<'n>,
}

impl<S: Slots> Slots for Noted<'_, S> {
    #[inline(always)]
    fn read<T: Word, const N: usize>(&self, at: usize) -> [T; N] {
        let words = self.ring.read(at);
        self.note.write(at - self.at, &words);
        words
    }
}

impl<'a, R: Fn(usize) -> SharedRegion<'a>> RingPages<'a, R> {
    /// The page in which all of the `bytes` bytes at `at` lie, if one does, and where they are in it.
    #[inline(always)]
    pub fn page(&self, at: usize, bytes: usize) -> Option<(SharedRegion<'a>, usize)> {
        let offset = at % PAGE_BYTES;
        (offset + bytes <= PAGE_BYTES).then(|| ((self.0)(at / PAGE_BYTES), offset))
    }

    /// Copies words in.
    #[inline(always)]
    pub fn write<T: Word, const N: usize>(&self, at: usize, words: [T; N]) {
        if at % PAGE_BYTES + N * size_of::<T>() <= PAGE_BYTES {
            return (self.0)(at / PAGE_BYTES).write(at % PAGE_BYTES, &words);
        }
        for (i, word) in words.into_iter().enumerate() {
            let at = at + i * size_of::<T>();
            (self.0)(at / PAGE_BYTES).write(at % PAGE_BYTES, &[word]);
        }
    }
}

/// A response, copied out of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The id of the request.
    pub id: u64,
    /// The operation of the request, as the backend names it.
    pub operation: u8,
    /// One of [`status`].
    pub status: i16,
}

/// The part of a request that every operation has.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// One of [`operation`]; for an indirect request the inner one.
    pub operation: u8,
    /// The virtual device number, cut to 16 bits.
    pub handle: u16,
    /// Echoed in the response.
    pub id: u64,
    /// The first sector.
    pub sector: u64,
}

/// A layout of slots.
pub trait Abi: 'static {
    /// The value of the `protocol` node (`xen/include/public/io/protocols.h`).
    const PROTOCOL: &'static str;
    /// Bytes from one slot to the next.
    const STRIDE: usize;

    /// Writes a read, write, barrier or flush with its segments (at most [`DIRECT_SEGMENTS`]).
    fn write_direct(ring: &SharedRegion<'_>, at: usize, head: Head, segments: &[Segment<GrantRef>]);

    /// Writes a request whose `segments` segments are in indirect pages.
    fn write_indirect(
        ring: &SharedRegion<'_>,
        at: usize,
        head: Head,
        segments: u16,
        pages: [GrantRef; INDIRECT_PAGES],
    );

    /// Writes a discard. `flag` is 0 or [`DISCARD_SECURE`].
    fn write_discard(ring: &SharedRegion<'_>, at: usize, head: Head, flag: u8, sectors: u64);

    /// Copies a response out, once.
    fn read_response(ring: &SharedRegion<'_>, at: usize) -> Response;

    /// Copies the head of a request out, once.
    fn read_head(ring: &impl Slots, at: usize) -> RequestHead;

    /// Copies the first segments of a direct request out, once each.
    fn read_segments(ring: &impl Slots, at: usize, into: &mut [SegmentEntry]);

    /// Copies the number of sectors of a discard out, once.
    fn read_discard_sectors(ring: &impl Slots, at: usize) -> u64;

    /// Copies the pages of an indirect request out, once.
    fn read_indirect_pages(ring: &impl Slots, at: usize) -> [GrantRef; INDIRECT_PAGES];

    /// Writes a response, padding and all (Xen advisory 216).
    fn write_response<'a>(
        ring: &RingPages<'a, impl Fn(usize) -> SharedRegion<'a>>,
        at: usize,
        response: Response,
    );
}

/// The layout of this machine.
#[cfg(not(target_arch = "x86"))]
pub type NativeAbi = Abi64;
/// The layout of this machine.
#[cfg(target_arch = "x86")]
pub type NativeAbi = Abi32;

/// Bytes of the ring's header, before slot 0 (`xen/include/public/io/ring.h`).
pub const RING_HEADER_BYTES: usize = 64;

/// How many slots a ring of `pages` pages has: a power of two.
pub const fn ring_slots(pages: usize, stride: usize) -> usize {
    let fit = (pages * 4096 - RING_HEADER_BYTES) / stride;
    1 << fit.ilog2()
}

/// Defines one layout: the structs, the assertions about them, and the implementation of [`Abi`].
macro_rules! layout {
    (
        $(#[$doc:meta])* $name:ident, $module:ident, $word:ty, protocol $protocol:expr,
        stride $stride:literal, pad $pad:literal, indirect_tail $tail:literal,
        response_tail $response_tail:literal,
        offsets: id $id:literal, sector $sector:literal, segments $segments:literal,
        sectors $sectors:literal, indirect_handle $indirect_handle:literal,
        grefs $grefs:literal, sizes: discard $discard:literal, response $response:literal
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub enum $name {}

        mod $module {
            use super::*;

            #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Direct {
                pub operation: u8,
                pub nr_segments: u8,
                pub handle: U16,
                pub pad: [u8; $pad],
                pub id: U64,
                pub sector_number: U64,
            }

            #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Discard {
                pub operation: u8,
                pub flag: u8,
                pub handle: U16,
                pub pad: [u8; $pad],
                pub id: U64,
                pub sector_number: U64,
                pub nr_sectors: U64,
            }

            #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Indirect {
                pub operation: u8,
                pub indirect_op: u8,
                pub nr_segments: U16,
                pub pad: [u8; $pad],
                pub id: U64,
                pub sector_number: U64,
                pub handle: U16,
                pub pad2: U16,
                pub indirect_grefs: [U32; INDIRECT_PAGES],
                pub pad3: [u8; $tail],
            }

            #[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct Response {
                pub id: U64,
                pub operation: u8,
                pub pad: u8,
                pub status: I16,
                pub tail: [u8; $response_tail],
            }

            pub const DIRECT_WORDS: usize = size_of::<Direct>() / size_of::<$word>();
            pub const DISCARD_WORDS: usize = size_of::<Discard>() / size_of::<$word>();
            pub const INDIRECT_WORDS: usize = size_of::<Indirect>() / size_of::<$word>();
            pub const RESPONSE_WORDS: usize = size_of::<Response>() / size_of::<$word>();

            const _: () = {
                assert!(size_of::<Direct>() == $segments);
                assert!($segments + DIRECT_SEGMENTS * size_of::<SegmentEntry>() == $stride);
                assert!(offset_of!(Direct, id) == $id);
                assert!(offset_of!(Discard, id) == $id);
                assert!(offset_of!(Indirect, id) == $id);
                assert!(offset_of!(Direct, sector_number) == $sector);
                assert!(offset_of!(Discard, sector_number) == $sector);
                assert!(offset_of!(Indirect, sector_number) == $sector);
                assert!(offset_of!(Direct, handle) == 2);
                assert!(offset_of!(Discard, nr_sectors) == $sectors);
                assert!(size_of::<Discard>() == $discard);
                assert!(offset_of!(Indirect, nr_segments) == 2);
                assert!(offset_of!(Indirect, handle) == $indirect_handle);
                assert!(offset_of!(Indirect, indirect_grefs) == $grefs);
                assert!(size_of::<Indirect>() == 64);
                assert!(size_of::<Response>() == $response);
                assert!(offset_of!(Response, operation) == 8);
                assert!(offset_of!(Response, status) == 10);
                assert!($stride % size_of::<$word>() == 0);
            };
        }

        impl Abi for $name {
            const PROTOCOL: &'static str = $protocol;
            const STRIDE: usize = $stride;

            #[inline(always)]
            fn write_direct(
                ring: &SharedRegion<'_>,
                at: usize,
                head: Head,
                segments: &[Segment<GrantRef>],
            ) {
                debug_assert!(segments.len() <= DIRECT_SEGMENTS);
                let words: [$word; $module::DIRECT_WORDS] = transmute!($module::Direct {
                    operation: head.operation,
                    nr_segments: segments.len() as u8,
                    handle: U16::new(head.handle),
                    pad: [0; $pad],
                    id: U64::new(head.id),
                    sector_number: U64::new(head.sector),
                });
                ring.write_list(at, words, segments, |_, segment| {
                    let words: [$word; 8 / size_of::<$word>()] =
                        transmute!(SegmentEntry::new(*segment));
                    words
                });
            }

            fn write_indirect(
                ring: &SharedRegion<'_>,
                at: usize,
                head: Head,
                segments: u16,
                pages: [GrantRef; INDIRECT_PAGES],
            ) {
                let words: [$word; $module::INDIRECT_WORDS] = transmute!($module::Indirect {
                    operation: operation::INDIRECT,
                    indirect_op: head.operation,
                    nr_segments: U16::new(segments),
                    pad: [0; $pad],
                    id: U64::new(head.id),
                    sector_number: U64::new(head.sector),
                    handle: U16::new(head.handle),
                    pad2: U16::ZERO,
                    indirect_grefs: pages.map(|page| U32::new(page.0)),
                    pad3: [0; $tail],
                });
                ring.write(at, &words);
            }

            fn write_discard(
                ring: &SharedRegion<'_>,
                at: usize,
                head: Head,
                flag: u8,
                sectors: u64,
            ) {
                let words: [$word; $module::DISCARD_WORDS] = transmute!($module::Discard {
                    operation: operation::DISCARD,
                    flag,
                    handle: U16::new(head.handle),
                    pad: [0; $pad],
                    id: U64::new(head.id),
                    sector_number: U64::new(head.sector),
                    nr_sectors: U64::new(sectors),
                });
                ring.write(at, &words);
            }

            #[inline(always)]
            fn read_response(ring: &SharedRegion<'_>, at: usize) -> Response {
                let words: [$word; $module::RESPONSE_WORDS] = ring.read(at);
                let response: $module::Response = transmute!(words);
                Response {
                    id: response.id.get(),
                    operation: response.operation,
                    status: response.status.get(),
                }
            }

            #[inline(always)]
            fn read_head(
                ring: &impl Slots,
                at: usize,
            ) -> RequestHead {
                let words: [$word; $module::DIRECT_WORDS] = ring.read(at);
                let direct: $module::Direct = transmute!(words);
                RequestHead {
                    operation: direct.operation,
                    detail: direct.nr_segments,
                    indirect_segments: direct.handle.get(),
                    id: direct.id.get(),
                    sector: direct.sector_number.get(),
                }
            }

            #[inline(always)]
            fn read_segments(
                ring: &impl Slots,
                at: usize,
                into: &mut [SegmentEntry],
            ) {
                let decode = |words: [$word; 8 / size_of::<$word>()]| transmute!(words);
                ring.read_list(at + $segments, into, decode);
            }

            fn read_discard_sectors(
                ring: &impl Slots,
                at: usize,
            ) -> u64 {
                let words: [$word; 8 / size_of::<$word>()] = ring.read(at + $sectors);
                let sectors: U64 = transmute!(words);
                sectors.get()
            }

            fn read_indirect_pages(
                ring: &impl Slots,
                at: usize,
            ) -> [GrantRef; INDIRECT_PAGES] {
                let words: [u32; INDIRECT_PAGES] = ring.read(at + $grefs);
                let pages: [U32; INDIRECT_PAGES] = transmute!(words);
                pages.map(|page| GrantRef(page.get()))
            }

            #[inline(always)]
            fn write_response<'a>(
                ring: &RingPages<'a, impl Fn(usize) -> SharedRegion<'a>>,
                at: usize,
                response: Response,
            ) {
                let words: [$word; $module::RESPONSE_WORDS] = transmute!($module::Response {
                    id: U64::new(response.id),
                    operation: response.operation,
                    pad: 0,
                    status: I16::new(response.status),
                    tail: [0; $response_tail],
                });
                ring.write(at, words);
            }
        }
    };
}

layout! {
    /// The 64-bit layout: `x86_64-abi`, and `arm-abi` for 32-bit and 64-bit Arm.
    Abi64, abi64, u64,
    protocol if cfg!(any(target_arch = "arm", target_arch = "aarch64")) { "arm-abi" } else { "x86_64-abi" },
    stride 112, pad 4, indirect_tail 4, response_tail 4,
    offsets: id 8, sector 16, segments 24, sectors 24, indirect_handle 24, grefs 28,
    sizes: discard 32, response 16
}

layout! {
    /// The layout of 32-bit x86: `x86_32-abi`.
    Abi32, abi32, u32,
    protocol "x86_32-abi",
    stride 108, pad 0, indirect_tail 8, response_tail 0,
    offsets: id 4, sector 12, segments 20, sectors 20, indirect_handle 20, grefs 24,
    sizes: discard 28, response 12
}

const _: () = {
    assert!(ring_slots(1, 112) == 32 && ring_slots(1, 108) == 32);
    assert!(ring_slots(2, 112) == 64 && ring_slots(4, 112) == 128);
    assert!(ring_slots(8, 108) == 256 && ring_slots(16, 112) == 512);
};
