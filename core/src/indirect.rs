//! Tables of segment descriptors that the peer reads: the indirect descriptors.
//!
//! All tables are allocated and shared when the disk is connected; a request takes as many as its
//! segments need and gives them back with the answer. The pool knows nothing of the entries but
//! their size: blkif has 8-byte segments, 512 in a page and up to 8 pages a request; VirtIO has
//! 16-byte descriptors, and one table a request, of as many pages as it takes.

use alloc::boxed::Box;
use core::marker::PhantomData;

use crate::memory::{
    Access, Handle, PAGE_BYTES, PageRun, PagesError, Share, SharedPages, SharedRegion,
};

/// One shared table, as a wire needs it to name it to the peer and to fill it.
#[derive(Clone, Copy, Debug)]
pub struct TableRef<'a, H> {
    /// The table's first (on Xen: only) page.
    pub handle: H,
    /// The table's memory.
    pub region: SharedRegion<'a>,
}

/// An entry in the format of a wire: one or more whole 64-bit words.
pub trait TableEntry: Copy {
    /// Bytes of an entry: a multiple of 8.
    const BYTES: usize;
    /// Writes the entry at byte `offset` of a table.
    fn write_to(&self, table: &SharedRegion<'_>, offset: usize);
    /// Writes the entries of a run of whole pages from byte `offset` of a table on; `entry` makes
    /// one of the page's place in the run and its handle.
    fn write_run<H: Handle>(
        run: PageRun<'_, H>,
        table: &SharedRegion<'_>,
        offset: usize,
        entry: impl FnMut(usize, H) -> Self,
    );
}

impl<const N: usize> TableEntry for [u64; N] {
    const BYTES: usize = N * 8;
    #[inline(always)]
    fn write_to(&self, table: &SharedRegion<'_>, offset: usize) {
        table.write(offset, self);
    }
    #[inline(always)]
    fn write_run<H: Handle>(
        run: PageRun<'_, H>,
        table: &SharedRegion<'_>,
        offset: usize,
        entry: impl FnMut(usize, H) -> Self,
    ) {
        run.write_entries(table, offset, entry);
    }
}

const NONE: u16 = u16::MAX;

/// The tables that one request holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    first: u16,
}

impl Chain {
    /// No tables at all.
    pub const EMPTY: Self = Self { first: NONE };
}

/// A pool of tables with entries of type `E`.
pub struct TablePool<S: Share, E> {
    pages: Option<SharedPages<S>>,
    /// For a free table the next free one, for a taken table the next of its request.
    next: Box<[u16]>,
    free: u16,
    available: usize,
    pages_each: usize,
    entry: PhantomData<fn() -> E>,
}

impl<S: Share, E: TableEntry> TablePool<S, E> {
    /// A pool without tables: every request is direct.
    pub fn empty() -> Self {
        Self {
            pages: None,
            next: Box::new([]),
            free: NONE,
            available: 0,
            pages_each: 1,
            entry: PhantomData,
        }
    }

    /// Allocates and shares `count` tables of `pages_each` pages. The peer only reads them, but may
    /// insist on `access` to write, too; nothing is ever read back from them.
    ///
    /// # Errors
    ///
    /// [`PagesError`] if there is no memory, or no budget to share it, or if the pages of a table do
    /// not follow each other in the peer's eyes.
    pub fn new(
        share: S,
        count: u16,
        pages_each: usize,
        access: Access,
    ) -> Result<Self, PagesError> {
        if count == 0 {
            return Ok(Self::empty());
        }
        let pages = SharedPages::new(share, usize::from(count) * pages_each, access)?;
        let follows = |page: usize| {
            page.is_multiple_of(pages_each) || pages.handle(page).follows(pages.handle(page - 1))
        };
        if !(0..pages.count()).all(follows) {
            return Err(PagesError::Scattered);
        }
        let next = (0..count).map(|i| if i + 1 < count { i + 1 } else { NONE }).collect();
        let available = usize::from(count);
        let free = 0;
        Ok(Self { pages: Some(pages), next, free, available, pages_each, entry: PhantomData })
    }

    /// How many entries one table has.
    #[inline(always)]
    pub fn entries_each(&self) -> usize {
        self.pages_each * PAGE_BYTES / E::BYTES
    }

    /// How many tables there are, taken or not.
    pub fn count(&self) -> usize {
        self.next.len()
    }

    /// How many tables are free.
    #[inline(always)]
    pub fn available(&self) -> usize {
        self.available
    }

    /// Takes a table for the request that holds `chain`, and says its number.
    #[inline]
    pub fn take(&mut self, chain: &mut Chain) -> Option<u16> {
        let number = self.free;
        let next = self.next.get_mut(usize::from(number))?;
        self.free = core::mem::replace(next, chain.first);
        chain.first = number;
        self.available -= 1;
        Some(number)
    }

    /// The table with a number that [`take`](Self::take) gave.
    #[inline]
    pub fn table(&self, number: u16) -> Option<TableRef<'_, S::Handle>> {
        let pages = self.pages.as_ref()?;
        let first_page = usize::from(number) * self.pages_each;
        Some(TableRef {
            handle: pages.handle(first_page),
            region: pages.region().part(first_page * PAGE_BYTES, self.pages_each * PAGE_BYTES),
        })
    }

    /// Gives back the tables of a request, and says how many they were.
    #[inline]
    pub fn release(&mut self, chain: Chain) -> usize {
        let (mut number, mut count) = (chain.first, 0);
        while let Some(next) = self.next.get_mut(usize::from(number)) {
            let following = core::mem::replace(next, self.free);
            self.free = number;
            number = following;
            count += 1;
        }
        self.available += count;
        count
    }
}
