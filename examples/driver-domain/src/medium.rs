//! What queues are served from: a RAM disk, or a queue of a disk of this domain.

use alloc::rc::Rc;
use core::cell::RefCell;

use pvblk::backend::{Completed, Operation, Requests, Store, Submitted};
use pvblk::command::Features;
use pvblk::extent::Geometry;
use pvblk::table::Tag;
use pvblk_stores::disk::DiskStore;
use pvblk_stores::memory::MemoryDisk;
use pvblk_xen::platform::EventChannels;
use xen_blkfront::{EventLine, Ring};
use xen_guest::Guest;

/// A RAM disk.
pub type RamDisk = MemoryDisk<&'static Guest>;

/// One queue of a disk of this domain.
pub type OwnQueue = DiskStore<(Ring<&'static Guest>, EventLine<&'static Guest>)>;

/// What one queue is served from.
pub enum Medium {
    /// A RAM disk: done when it is submitted.
    Ram(RamDisk),
    /// A queue of a disk of this domain. It outlives the queue that it serves, and is found by
    /// whoever follows that disk. Nobody borrows it for longer than one call, so that it is free
    /// whenever it is borrowed.
    Own(Rc<RefCell<OwnQueue>>),
}

impl Medium {
    /// Whether there may be completions to take.
    #[inline]
    pub fn has_news(&self, guest: &Guest) -> bool {
        match self {
            Self::Ram(_) => false,
            Self::Own(queue) => queue.borrow().line().port().is_some_and(|port| guest.take(port)),
        }
    }

    /// Asks to be told of completions. `true` if there is something to do at once.
    #[inline]
    pub fn sleep(&self) -> bool {
        match self {
            Self::Ram(_) => false,
            Self::Own(queue) => queue.borrow_mut().sleep(),
        }
    }
}

impl Store for Medium {
    fn geometry(&self) -> Geometry {
        match self {
            Self::Ram(disk) => disk.geometry(),
            Self::Own(queue) => queue.borrow().geometry(),
        }
    }

    fn features(&self) -> Features {
        match self {
            Self::Ram(disk) => disk.features(),
            Self::Own(queue) => queue.borrow().features(),
        }
    }

    fn capacity(&self) -> usize {
        match self {
            Self::Ram(disk) => disk.capacity(),
            Self::Own(queue) => queue.borrow().capacity(),
        }
    }

    #[inline(always)]
    fn submit(&mut self, tag: Tag, operation: Operation<'_>) -> Submitted {
        match self {
            Self::Ram(disk) => disk.submit(tag, operation),
            Self::Own(queue) => queue.borrow_mut().submit(tag, operation),
        }
    }

    #[inline(always)]
    fn commit(&mut self, requests: &dyn Requests) {
        match self {
            Self::Ram(_) => {}
            Self::Own(queue) => queue.borrow_mut().commit(requests),
        }
    }

    #[inline(always)]
    fn complete(&mut self, requests: &dyn Requests) -> Option<Completed> {
        match self {
            Self::Ram(_) => None,
            Self::Own(queue) => queue.borrow_mut().complete(requests),
        }
    }

    fn quiesce(&mut self, requests: &dyn Requests) {
        match self {
            Self::Ram(_) => {}
            Self::Own(queue) => queue.borrow_mut().quiesce(requests),
        }
    }
}
