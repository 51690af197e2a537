//! A window of shared memory that can only be copied to and from.

use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::PAGE_BYTES;
use super::copy::copy;

/// A window of memory that a peer may read or write at any moment.
///
/// There is no way to borrow from it: a value is copied out once and then looked at, or made
/// elsewhere and then copied in (Xen advisory 155). All accesses are volatile or atomic, so that
/// the compiler neither repeats nor invents one. Offsets are in bytes. An access outside the window
/// panics: offsets come from our own arithmetic, never from the peer.
#[derive(Clone, Copy, Debug)]
pub struct SharedRegion<'a> {
    base: NonNull<u8>,
    bytes: usize,
    lifetime: PhantomData<&'a ()>,
}

// SAFETY: a region is a pointer to memory that is meant for concurrent access by another party, and
// every access is volatile or atomic; which thread makes it does not matter.
unsafe impl Send for SharedRegion<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRegion<'_> {}

/// A machine word in which shared memory is copied: `u32` or `u64`.
pub trait Word: Copy + sealed::Sealed {}
impl Word for u32 {}
impl Word for u64 {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

impl SharedRegion<'_> {
    /// Makes a window of `bytes` bytes at `base`.
    ///
    /// # Safety
    ///
    /// For the lifetime of the region the memory is valid for reads and writes, and no Rust
    /// reference to any part of it exists. `base` is aligned to 8 bytes (or this panics).
    #[inline]
    pub unsafe fn new(base: NonNull<u8>, bytes: usize) -> Self {
        assert!(
            (base.as_ptr() as usize).is_multiple_of(8),
            "a shared region starts at a multiple of 8 bytes"
        );
        Self { base, bytes, lifetime: PhantomData }
    }

    /// Makes a window of `bytes` bytes at `base`.
    ///
    /// # Safety
    ///
    /// As for [`new`](Self::new), but the alignment of `base` is not checked.
    #[inline(always)]
    pub(super) unsafe fn new_aligned(base: NonNull<u8>, bytes: usize) -> Self {
        Self { base, bytes, lifetime: PhantomData }
    }

    /// Makes a window of one page.
    ///
    /// # Safety
    ///
    /// As for [`new`](Self::new); `base` is aligned to [`PAGE_BYTES`], which is not checked.
    #[inline(always)]
    pub unsafe fn of_page(base: NonNull<u8>) -> Self {
        Self { base, bytes: PAGE_BYTES, lifetime: PhantomData }
    }

    /// The size of the window in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the window has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Where the window starts in this address space.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The part of the window from `offset`, `bytes` long. `offset` is a multiple of 8.
    #[inline(always)]
    pub fn part(&self, offset: usize, bytes: usize) -> Self {
        let base = self.at(offset, bytes, 8);
        Self { base, bytes, lifetime: PhantomData }
    }

    #[inline(always)]
    fn at(&self, offset: usize, bytes: usize, alignment: usize) -> NonNull<u8> {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "outside the shared region");
        assert!(offset.is_multiple_of(alignment), "misaligned access to a shared region");
        // SAFETY: the assertion above keeps the result inside the window (or one past its end).
        unsafe { self.base.add(offset) }
    }

    /// Copies `N` words out. `offset` is a multiple of the word's size.
    #[inline(always)]
    pub fn read<T: Word, const N: usize>(&self, offset: usize) -> [T; N] {
        let base = self.at(offset, N * size_of::<T>(), size_of::<T>()).cast::<T>();
        // SAFETY: `at` checked the bounds and the alignment of all `N` words.
        core::array::from_fn(|i| unsafe { base.add(i).read_volatile() })
    }

    /// Copies `N` words out for each place of `into`, and puts there what `decode` makes of them.
    /// `offset` is a multiple of the word's size.
    #[inline(always)]
    pub fn read_list<T: Word, U, const N: usize>(
        &self,
        offset: usize,
        into: &mut [U],
        mut decode: impl FnMut([T; N]) -> U,
    ) {
        let bytes = into.len().saturating_mul(N * size_of::<T>());
        let base = self.at(offset, bytes, size_of::<T>()).cast::<T>();
        for (place, item) in into.iter_mut().enumerate() {
            // SAFETY: `at` checked the bounds and the alignment of all the words: `N` for each place.
            let word = |i| unsafe { base.add(place * N + i).read_volatile() };
            *item = decode(core::array::from_fn(word));
        }
    }

    /// A way to copy pairs of words out one by one, `count` of them. `offset` is a multiple of the
    /// word's size. Past the last pair there is none.
    #[inline(always)]
    pub fn pairs<T: Word>(&self, offset: usize, count: usize) -> impl Fn(usize) -> Option<[T; 2]> {
        let bytes = count.saturating_mul(size_of::<[T; 2]>());
        let base = self.at(offset, bytes, size_of::<T>()).cast::<T>();
        move |place| {
            if place >= count {
                return None;
            }
            // SAFETY: `at` checked the bounds and the alignment of the words of all pairs.
            unsafe {
                let first = base.add(place * 2);
                Some([first.read_volatile(), first.add(1).read_volatile()])
            }
        }
    }

    /// Copies words in. `offset` is a multiple of the word's size.
    #[inline(always)]
    pub fn write<T: Word>(&self, offset: usize, words: &[T]) {
        let base = self.at(offset, size_of_val(words), size_of::<T>()).cast::<T>();
        for (i, word) in words.iter().enumerate() {
            // SAFETY: `at` checked the bounds and the alignment of all the words.
            unsafe { base.add(i).write_volatile(*word) };
        }
    }

    /// Copies in the words of `head`, and after them the `N` words that `encode` makes of each of
    /// `items` and its place. `offset` is a multiple of the word's size.
    #[inline(always)]
    pub fn write_list<T: Word, U, const M: usize, const N: usize>(
        &self,
        offset: usize,
        head: [T; M],
        items: &[U],
        mut encode: impl FnMut(usize, &U) -> [T; N],
    ) {
        // A sum that is too large is outside of every window.
        let words = items.len().saturating_mul(N).saturating_add(M);
        let bytes = words.saturating_mul(size_of::<T>());
        let base = self.at(offset, bytes, size_of::<T>()).cast::<T>();
        for (i, word) in head.into_iter().enumerate() {
            // SAFETY: `at` checked the bounds and the alignment of all the words, these and those
            // below: `i` is below `M` here, and `place` and `i` below `items.len()` and `N` there.
            unsafe { base.add(i).write_volatile(word) };
        }
        for (place, item) in items.iter().enumerate() {
            for (i, word) in encode(place, item).into_iter().enumerate() {
                // SAFETY: see above.
                unsafe { base.add(M + place * N + i).write_volatile(word) };
            }
        }
    }

    /// Copies bytes out, from any offset.
    #[inline(always)]
    pub fn read_bytes(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len(), 1).as_ptr();
        // SAFETY: `at` checked that so many bytes are inside; `into` is ours alone.
        unsafe { copy(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in, to any offset.
    #[inline(always)]
    pub fn write_bytes(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len(), 1).as_ptr();
        // SAFETY: `at` checked that so many bytes are inside; nobody writes to `from`.
        unsafe { copy(from.as_ptr(), to, from.len()) }
    }

    /// Copies `bytes` bytes in from another window, which does not overlap with this one.
    #[inline(always)]
    pub fn copy_from(
        &self,
        offset: usize,
        other: &SharedRegion<'_>,
        other_offset: usize,
        bytes: usize,
    ) {
        let to = self.at(offset, bytes, 1).as_ptr();
        let from = other.at(other_offset, bytes, 1).as_ptr();
        // SAFETY: `at` checked both ranges. Where they do overlap (two windows of the same pages),
        // bytes come in the order of this copy: both are memory that may change at any time.
        unsafe { copy(from, to, bytes) }
    }

    /// The bytes in place.
    ///
    /// # Safety
    ///
    /// While the slice lives, nobody else accesses the memory: not this side, through another copy
    /// of the region, and not the peer, which must be trusted to keep its hands off outside of a
    /// request. A peer that does not changes what Rust believes to be constant.
    pub unsafe fn as_mut_slice<'b>(self) -> &'b mut [u8]
    where
        Self: 'b,
    {
        // SAFETY: `new` vouched for the memory, the caller vouches for everybody else.
        unsafe { core::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }

    /// Sets every byte of the window to zero.
    pub fn clear(&self) {
        const ZEROES: [u8; 256] = [0; 256];
        let mut offset = 0;
        while offset < self.bytes {
            let count = ZEROES.len().min(self.bytes - offset);
            self.write_bytes(offset, &ZEROES[..count]);
            offset += count;
        }
    }

    /// Copies a byte in, to any offset.
    #[inline(always)]
    pub fn write_byte(&self, offset: usize, byte: u8) {
        // SAFETY: `at` checked that the byte is inside.
        unsafe { self.at(offset, 1, 1).write_volatile(byte) }
    }

    /// Loads an aligned `u16` atomically.
    #[inline(always)]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let at = self.at(offset, 2, 2).cast::<AtomicU16>();
        // SAFETY: in bounds, aligned, and only ever accessed through atomics and volatiles.
        unsafe { at.as_ref() }.load(order)
    }

    /// Stores an aligned `u16` atomically.
    #[inline(always)]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        let at = self.at(offset, 2, 2).cast::<AtomicU16>();
        // SAFETY: in bounds, aligned, and only ever accessed through atomics and volatiles.
        unsafe { at.as_ref() }.store(value, order);
    }

    /// Loads an aligned `u32` atomically.
    #[inline(always)]
    pub fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        let at = self.at(offset, 4, 4).cast::<AtomicU32>();
        // SAFETY: in bounds, aligned, and only ever accessed through atomics and volatiles.
        unsafe { at.as_ref() }.load(order)
    }

    /// Stores an aligned `u32` atomically.
    #[inline(always)]
    pub fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        let at = self.at(offset, 4, 4).cast::<AtomicU32>();
        // SAFETY: in bounds, aligned, and only ever accessed through atomics and volatiles.
        unsafe { at.as_ref() }.store(value, order);
    }
}
