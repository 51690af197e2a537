//! The guest's RAM, in pages of 4096 bytes.
//!
//! All RAM is mapped to itself: an address in the program is the guest-physical address, and an
//! address divided by 4096 is the guest frame number that grants and the hypervisor use.

use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::frames::Frames;
use crate::sync::Locked;

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;

static FRAMES: Locked<Option<Frames>> = Locked::new(None);

/// One byte past the highest RAM that is mapped.
static RAM_END: AtomicU64 = AtomicU64::new(0);

/// Gives the allocator its bitmap, for RAM up to `end`, and the RAM that is mapped already.
///
/// # Safety
///
/// `ram` is mapped to itself, and nobody uses the memory in `ram` outside `occupied`.
pub unsafe fn start(
    ram: &[Range<u64>],
    end: u64,
    occupied: impl Iterator<Item = Range<u64>> + Clone,
) -> Option<()> {
    let words = Frames::words_for(frame_of(end));
    let bitmap_bytes = (words * 8) as u64;

    // The bitmap itself goes to the lowest place where nothing is in its way.
    let place = ram.iter().find_map(|range| {
        let mut start = range.start.next_multiple_of(PAGE_BYTES as u64);
        while let Some(obstacle) =
            occupied.clone().find(|o| o.start < start + bitmap_bytes && start < o.end)
        {
            start = obstacle.end.next_multiple_of(PAGE_BYTES as u64);
        }
        (start + bitmap_bytes <= range.end).then_some(start)
    })?;
    // SAFETY: this is RAM that nothing occupies, page-aligned, and it is reserved below for good.
    let bitmap = unsafe {
        let address = core::ptr::with_exposed_provenance_mut::<u64>(place as usize);
        core::ptr::write_bytes(address, 0, words);
        core::slice::from_raw_parts_mut(address, words)
    };
    let mut frames = Frames::new(bitmap);
    for range in ram {
        let whole = range.start.next_multiple_of(PAGE_BYTES as u64)..range.end;
        frames.release(frame_of(whole.start)..frame_of(whole.end));
    }
    for range in occupied.chain(core::iter::once(place..place + bitmap_bytes)) {
        frames.reserve(
            frame_of(range.start)..frame_of(range.end.next_multiple_of(PAGE_BYTES as u64)),
        );
    }
    RAM_END.store(end, Ordering::Relaxed);
    FRAMES.with(|slot| *slot = Some(frames));
    Some(())
}

fn frame_of(address: u64) -> usize {
    address as usize / PAGE_BYTES
}

/// Adds RAM that was mapped later.
///
/// # Safety
///
/// `ram` is mapped to itself, and nobody uses it.
#[cfg(target_os = "none")]
pub unsafe fn add(ram: Range<u64>) {
    FRAMES.with(|slot| {
        if let Some(frames) = slot {
            let start = ram.start.next_multiple_of(PAGE_BYTES as u64);
            frames.release(frame_of(start)..frame_of(ram.end));
        }
    });
}

/// Takes `count` zeroed pages that follow each other.
pub fn allocate(count: usize) -> Option<NonNull<u8>> {
    let first = FRAMES.with(|slot| slot.as_mut()?.take(count))?;
    let base = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(first * PAGE_BYTES))?;
    // SAFETY: these frames are mapped to themselves and were free.
    unsafe { base.write_bytes(0, count * PAGE_BYTES) };
    Some(base)
}

/// Gives pages back.
///
/// # Safety
///
/// They are those of one earlier [`allocate`], and nobody uses them any more: not the program, and
/// no other domain.
pub unsafe fn release(base: NonNull<u8>, count: usize) {
    let first = base.addr().get() / PAGE_BYTES;
    FRAMES.with(|slot| {
        if let Some(frames) = slot {
            frames.release(first..first + count);
        }
    });
}

/// Pages that are free.
pub fn free() -> usize {
    FRAMES.with(|slot| slot.as_ref().map_or(0, Frames::free))
}

/// The guest frame of a page; `None` if the address is not a page's or lies beyond all RAM.
pub fn frame_of_page(page: NonNull<u8>) -> Option<u32> {
    let address = page.addr().get();
    if !address.is_multiple_of(PAGE_BYTES) || address as u64 >= RAM_END.load(Ordering::Relaxed) {
        return None;
    }
    u32::try_from(address / PAGE_BYTES).ok()
}
