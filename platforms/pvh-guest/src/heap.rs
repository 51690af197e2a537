//! The heap: small things from one block of memory, large ones from the page allocator.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;

use crate::pages::{self, PAGE_BYTES};
use crate::sync::Locked;

/// From this size on, an allocation is whole pages of its own: bulk memory neither fragments the
/// list of small blocks nor is limited by it.
const LARGE: usize = 32 * 1024;
/// Bounds of the block for small things, which is a sixteenth of the memory.
const SMALLEST: usize = 1 << 20;
const LARGEST: usize = 16 << 20;

static SMALL: Locked<Heap> = Locked::new(Heap::empty());

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Takes the block for small things.
pub fn start() {
    let bytes = (pages::free() * PAGE_BYTES / 16).clamp(SMALLEST, LARGEST);
    if let Some(block) = pages::allocate(bytes / PAGE_BYTES) {
        // SAFETY: these pages were just allocated, and the heap keeps them for good.
        SMALL.with(|heap| unsafe { heap.init(block.as_ptr(), bytes / PAGE_BYTES * PAGE_BYTES) });
    }
}

fn is_large(layout: &Layout) -> bool {
    layout.size() >= LARGE
}

// SAFETY: both sources give memory that is not in use, of the size and alignment that was asked for;
// which of the two a block is from follows from its layout alone.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let block = if !is_large(&layout) {
            SMALL.with(|heap| heap.allocate_first_fit(layout).ok())
        } else if layout.align() <= PAGE_BYTES {
            pages::allocate(layout.size().div_ceil(PAGE_BYTES))
        } else {
            None
        };
        block.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on from the caller.
        let block = unsafe { self.alloc(layout) };
        // Pages are zeroed already.
        if !block.is_null() && !is_large(&layout) {
            // SAFETY: just allocated, of this size.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(block) = NonNull::new(block) else { return };
        if is_large(&layout) {
            // SAFETY: `alloc` took these pages for this layout.
            unsafe { pages::release(block, layout.size().div_ceil(PAGE_BYTES)) };
        } else {
            // SAFETY: `alloc` took it from this heap with this layout.
            SMALL.with(|heap| unsafe { heap.deallocate(block, layout) });
        }
    }
}
