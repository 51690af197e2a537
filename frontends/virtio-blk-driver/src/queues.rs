//! The queues of a disk, in whichever form their users have them.

use alloc::vec::Vec;

use pvblk::frontend::queue::Queue;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::transport::{Interrupt, Transport};

use crate::line::DeviceLine;
use crate::{DiskQueue, Frontend};

/// The queues of one disk, as [`Disk`](crate::Disk) needs to reach them when their device changes.
pub trait Queues<T: Transport, I: Interrupt, Q: DriverQueue> {
    /// Calls `work` for each queue, with its number.
    fn for_each(&mut self, work: &mut Work<'_, T, I, Q>);
}

/// What is done for each queue of a disk.
pub type Work<'w, T, I, Q> = dyn FnMut(usize, &mut dyn Connection<T, I, Q>) + 'w;

/// What a disk changes in a queue.
pub trait Connection<T: Transport, I: Interrupt, Q: DriverQueue> {
    /// The queue's engine.
    fn frontend(&mut self) -> &mut Frontend<T, Q>;
    /// The queue's line.
    fn line(&mut self) -> &mut DeviceLine<T, I>;
    /// Shows what waits to the device.
    fn commit(&mut self);
}

impl<T: Transport, I: Interrupt, Q: DriverQueue> Connection<T, I, Q> for DiskQueue<T, I, Q> {
    fn frontend(&mut self) -> &mut Frontend<T, Q> {
        &mut self.frontend
    }

    fn line(&mut self) -> &mut DeviceLine<T, I> {
        self.line_mut()
    }

    fn commit(&mut self) {
        Queue::commit(self);
    }
}

impl<T: Transport, I: Interrupt, Q: DriverQueue> Queues<T, I, Q> for Vec<DiskQueue<T, I, Q>> {
    fn for_each(&mut self, work: &mut Work<'_, T, I, Q>) {
        self.iter_mut().enumerate().for_each(|(number, queue)| work(number, queue));
    }
}

#[cfg(feature = "async")]
impl<T, I, Q, M> Queues<T, I, Q> for Vec<crate::AsyncDiskQueue<M, T, I, Q>>
where
    T: Transport,
    I: Interrupt,
    Q: DriverQueue,
    M: embassy_sync::blocking_mutex::raw::RawMutex,
{
    fn for_each(&mut self, work: &mut Work<'_, T, I, Q>) {
        for (number, queue) in self.iter().enumerate() {
            queue.with_queue(|queue| work(number, queue));
        }
    }
}
