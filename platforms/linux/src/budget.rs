//! How many foreign pages this process may have mapped, and for what.
//!
//! The kernel gives a process so many mappings (`vm.max_map_count`). A mapped page may become one
//! of its own, as parts of a group can be unmapped; and the process needs some for itself. So pages
//! are counted as if each were a mapping, and what a peer has mapped can never take up the rest.
//!
//! Guests may have pages kept mapped, which is a matter of speed alone. Each queue has a share of
//! seven eighths of all for that, so that there is room for the rings of those who come later.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use pvblk_xen::platform::Purpose;

/// Mappings that are left to the rest of the process: threads, the allocator, files.
const RESERVE: usize = 8192;

/// What Linux allows unless told otherwise.
const DEFAULT_LIMIT: usize = 65530;

/// The longest ring of a queue, in pages (`max-ring-page-order` 4).
const RING_PAGES: usize = 16;

/// What all threads have in common.
static BUDGET: Budget = Budget::new();

/// What is mapped, and by how many.
struct Budget {
    /// Pages that are mapped now.
    mapped: AtomicUsize,
    /// Devices that are open: one for each queue.
    queues: AtomicUsize,
}

/// Pages that may be mapped, given the kernel's limit.
fn allowed(limit: usize) -> usize {
    limit.saturating_sub(RESERVE).max(limit / 2)
}

fn most() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        allowed(limit.and_then(|limit| limit.trim().parse().ok()).unwrap_or(DEFAULT_LIMIT))
    })
}

impl Budget {
    const fn new() -> Self {
        Self { mapped: AtomicUsize::new(0), queues: AtomicUsize::new(0) }
    }

    /// How many of `most` pages may be mapped when one for this purpose is.
    fn bound(purpose: Purpose, most: usize) -> usize {
        match purpose {
            Purpose::Keep => most - most / 8,
            Purpose::Request => most - most / 16,
            Purpose::Ring => most,
        }
    }

    fn reserve(&'static self, count: usize, purpose: Purpose, most: usize) -> Option<Reserved> {
        // Not before: one that is dropped gives back what it did not take.
        self.take(count, purpose, most).then(|| Reserved { budget: self, count })
    }

    fn take(&self, count: usize, purpose: Purpose, most: usize) -> bool {
        let bound = Self::bound(purpose, most);
        let update = |mapped: usize| mapped.checked_add(count).filter(|&mapped| mapped <= bound);
        self.mapped.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).is_ok()
    }

    fn share(&self, most: usize) -> usize {
        let queues = self.queues.load(Ordering::Relaxed).max(1);
        (Self::bound(Purpose::Keep, most) / queues).saturating_sub(RING_PAGES)
    }
}

/// Pages that are about to be mapped. Given back when it is dropped, unless they are kept.
pub(crate) struct Reserved {
    budget: &'static Budget,
    count: usize,
}

impl Reserved {
    /// They are mapped now.
    pub(crate) fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.mapped.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// Takes `count` pages, if so many are left for this purpose.
pub(crate) fn take(count: usize, purpose: Purpose) -> Option<Reserved> {
    BUDGET.reserve(count, purpose, most())
}

/// Gives pages back that were unmapped.
pub(crate) fn give_back(count: usize) {
    BUDGET.mapped.fetch_sub(count, Ordering::Relaxed);
}

/// The most pages that one queue should keep mapped, now that there are so many.
pub(crate) fn share() -> usize {
    BUDGET.share(most())
}

/// One of those who share.
#[derive(Debug)]
pub(crate) struct Member(());

impl Member {
    pub(crate) fn join() -> Self {
        BUDGET.queues.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        BUDGET.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = DEFAULT_LIMIT - RESERVE;

    #[test]
    fn some_mappings_are_left_to_the_process() {
        assert_eq!(allowed(DEFAULT_LIMIT), MOST);
        assert_eq!(allowed(2000), 1000);
    }

    #[test]
    fn what_is_taken_comes_back_unless_it_is_kept() {
        // Other tests map pages meanwhile.
        static BUDGET: Budget = Budget::new();
        let take = |count| BUDGET.reserve(count, Purpose::Ring, MOST);
        let mapped = || BUDGET.mapped.load(Ordering::Relaxed);
        drop(take(MOST).unwrap());
        assert_eq!(mapped(), 0);
        take(7).unwrap().keep();
        assert_eq!(mapped(), 7);
        assert!(take(usize::MAX).is_none() && take(MOST - 6).is_none());
        take(MOST - 7).unwrap().keep();
        assert_eq!(mapped(), MOST);
    }

    #[test]
    fn kept_pages_leave_room_for_requests_and_both_for_rings() {
        let budget = Budget::new();
        let fill = |purpose: Purpose| (0..).take_while(|_| budget.take(1, purpose, MOST)).count();
        assert!(fill(Purpose::Keep) >= MOST * 7 / 8);
        assert!(!budget.take(1, Purpose::Keep, MOST));
        assert!(fill(Purpose::Request) >= MOST / 16 - 1);
        assert!(!budget.take(1, Purpose::Request, MOST));
        // Sixteen pages for each of four queues, of 55 guests.
        assert!(fill(Purpose::Ring) >= 55 * 4 * 16);
        assert!(!budget.take(1, Purpose::Ring, MOST));
    }

    /// Guests of four processors come one by one, and each keeps what it may at once.
    #[test]
    fn those_who_come_later_have_rings_and_a_share() {
        let budget = Budget::new();
        let mut kept = Vec::new();
        for guest in 0..400 {
            for _ in 0..4 {
                budget.queues.fetch_add(1, Ordering::Relaxed);
                assert!(budget.take(RING_PAGES, Purpose::Ring, MOST), "guest {guest} has no ring");
                kept.push(0_usize);
            }
            for pages in &mut kept {
                let share = budget.share(MOST).min(1056);
                // What is more than its share goes when a queue is tidied.
                budget.mapped.fetch_sub(pages.saturating_sub(share), Ordering::Relaxed);
                *pages = (*pages).min(share);
            }
            for pages in &mut kept {
                let share = budget.share(MOST).min(1056);
                while *pages < share && budget.take(1, Purpose::Keep, MOST) {
                    *pages += 1;
                }
                assert!(*pages >= share.saturating_sub(1), "guest {guest}: {pages} of {share}");
            }
        }
    }
}
