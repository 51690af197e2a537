//! The queues of a disk, in whichever form their users have them.

use alloc::vec::Vec;

use pvblk_xen::platform::Platform;

use crate::FrontQueue;
use crate::line::EventLine;

/// The queues of one disk, as [`Disk`](crate::Disk) needs to reach them when their connection
/// changes.
pub trait Queues<P: Platform> {
    /// Calls `work` for each queue, with its number.
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<P>));
}

/// What a disk changes in a queue.
pub trait Connection<P: Platform> {
    /// The queue's engine.
    fn frontend(&mut self) -> &mut crate::Frontend<P>;
    /// The queue's event channel.
    fn line(&mut self) -> &mut EventLine<P>;
    /// Shows what waits to the backend.
    fn commit(&mut self);
}

impl<P: Platform> Connection<P> for FrontQueue<P> {
    fn frontend(&mut self) -> &mut crate::Frontend<P> {
        &mut self.frontend
    }

    fn line(&mut self) -> &mut EventLine<P> {
        self.line_mut()
    }

    fn commit(&mut self) {
        FrontQueue::commit(self);
    }
}

impl<P: Platform> Queues<P> for Vec<FrontQueue<P>> {
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<P>)) {
        self.iter_mut().enumerate().for_each(|(number, queue)| work(number, queue));
    }
}

#[cfg(feature = "async")]
impl<M, P> Queues<P> for Vec<crate::AsyncFrontQueue<M, P>>
where
    P: Platform,
    M: embassy_sync::blocking_mutex::raw::RawMutex,
{
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<P>)) {
        for (number, queue) in self.iter().enumerate() {
            queue.with_queue(|queue| work(number, queue));
        }
    }
}
