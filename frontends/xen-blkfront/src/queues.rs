//! The queues of a disk, in whichever form their users have them.

use alloc::vec::Vec;

use pvblk::frontend::queue::Queue;
use pvblk_xen::platform::Platform;

use crate::line::{EventLine, WatchedLine, XenLine};
use crate::{FrontQueue, Ring};

/// The queues of one disk, as [`Disk`](crate::Disk) needs to reach them when their connection
/// changes.
pub trait Queues<'t, T: Platform> {
    /// Calls `work` for each queue, with its number.
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<'t, T>));
}

/// What a disk changes in a queue.
pub trait Connection<'t, T: Platform> {
    /// The queue's engine.
    fn frontend(&mut self) -> &mut crate::Frontend<'t, T>;
    /// The queue's event channel.
    fn line(&mut self) -> &mut EventLine<'t, T>;
    /// Shows what waits to the backend.
    fn commit(&mut self);
}

impl<'t, T: Platform, L: XenLine<'t, T>> Connection<'t, T> for Queue<(Ring<'t, T>, L)> {
    fn frontend(&mut self) -> &mut crate::Frontend<'t, T> {
        &mut self.frontend
    }

    fn line(&mut self) -> &mut EventLine<'t, T> {
        self.line_mut().event_line()
    }

    fn commit(&mut self) {
        Queue::commit(self);
    }
}

impl<'t, T: Platform> Queues<'t, T> for Vec<FrontQueue<'t, T>> {
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<'t, T>)) {
        self.iter_mut().enumerate().for_each(|(number, queue)| work(number, queue));
    }
}

impl<'s, 't, T: Platform> Queues<'t, T> for Vec<FrontQueue<'t, T, WatchedLine<'s, 't, T>>> {
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<'t, T>)) {
        self.iter_mut().enumerate().for_each(|(number, queue)| work(number, queue));
    }
}

#[cfg(feature = "async")]
impl<'t, T: Platform, M, L> Queues<'t, T> for Vec<crate::AsyncFrontQueue<'t, T, M, L>>
where
    M: embassy_sync::blocking_mutex::raw::RawMutex,
    L: XenLine<'t, T>,
{
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<'t, T>)) {
        for (number, queue) in self.iter().enumerate() {
            queue.with_queue(|queue| work(number, queue));
        }
    }
}
