//! How many foreign pages this process may have mapped.
//!
//! The kernel gives a process so many mappings (`vm.max_map_count`). A mapped page may become one
//! of its own, as parts of a group can be unmapped; and the process needs some for itself. So pages
//! are counted as if each were a mapping, and what a peer has mapped can never take up the rest.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

/// Mappings that are left to the rest of the process: threads, the allocator, files.
const RESERVE: usize = 8192;

/// What Linux allows unless told otherwise.
const DEFAULT_LIMIT: usize = 65530;

/// Pages that are mapped now, by all threads.
static MAPPED: AtomicUsize = AtomicUsize::new(0);

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

/// Pages that are about to be mapped. Given back when it is dropped, unless they are kept.
pub(crate) struct Reserved(usize);

impl Reserved {
    /// They are mapped now.
    pub(crate) fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        give_back(self.0);
    }
}

/// Takes `count` pages, if so many are left.
pub(crate) fn take(count: usize) -> Option<Reserved> {
    let most = most();
    let update = |mapped: usize| mapped.checked_add(count).filter(|&mapped| mapped <= most);
    MAPPED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).ok()?;
    Some(Reserved(count))
}

/// Gives pages back that were unmapped.
pub(crate) fn give_back(count: usize) {
    MAPPED.fetch_sub(count, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_mappings_are_left_to_the_process() {
        assert_eq!(allowed(DEFAULT_LIMIT), DEFAULT_LIMIT - RESERVE);
        assert_eq!(allowed(2000), 1000);
    }

    #[test]
    fn what_is_taken_comes_back_unless_it_is_kept() {
        let most = most();
        drop(take(most).unwrap());
        take(most).unwrap().keep();
        assert!(take(1).is_none());
        give_back(most);
        drop(take(1).unwrap());
    }
}
