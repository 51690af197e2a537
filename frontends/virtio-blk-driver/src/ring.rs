//! The resources of one queue: rings, indirect tables, buffers to bounce through.

use alloc::sync::Arc;

use pvblk::buffer::Pool;
use pvblk::frontend::{Link, Wire};
use pvblk::indirect::{TableEntry, TablePool};
use pvblk::memory::{Access, PAGE_BYTES, PagesError, Share, ShareError};
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::{DriverQueue, QueueError};
use pvblk_virtio::transport::Transport;
use pvblk_virtio::{Address, DriverWire, limits};

use crate::config::Config;
use crate::error::Error;
use crate::properties::Properties;
use crate::session::{Live, Session};
use crate::{Lender, Ring};

/// The smallest queue that takes a request: of one descriptor, which names a table, or of three, for a
/// header, data and a status. A split queue's size is a power of two.
fn smallest<Q: DriverQueue>(features: Features) -> u16 {
    match (features.contains(Features::INDIRECT), Q::FEATURE.contains(Features::PACKED)) {
        (true, _) => 1,
        (false, true) => 3,
        (false, false) => 4,
    }
}

/// Makes queue `number`, and tells the device where it is. `None` if the device has no such queue, or
/// one without room for a request.
pub(crate) fn open<T: Transport + Clone, Q: DriverQueue>(
    transport: &T,
    lender: &Lender<Q>,
    session: &Arc<Session>,
    number: u16,
    features: Features,
    config: &Config,
) -> Result<Option<Ring<T, Q>>, Error>
where
    Lender<Q>: Clone,
{
    let smallest = smallest::<Q>(features);
    let most = transport.queue_size(number).min(config.queue_size.max(smallest).into()) as u16;
    if most < smallest {
        return Ok(None);
    }
    // Split queues must be a power of two, and packed ones may.
    let mut size = (1 << most.ilog2()).max(smallest);
    let queue = loop {
        match Q::new(lender.clone(), size, features) {
            Ok(queue) => break queue,
            // Where memory is short, or in pieces, a small queue is better than none.
            Err(QueueError::Pages(_)) if size / 2 >= smallest => size /= 2,
            Err(error) => return Err(error.into()),
        }
    };
    transport.enable_queue(number, queue.size(), queue.addresses());
    let wire = DriverWire::new(queue, lender.clone(), features)?;
    Ok(Some(Live::new(wire, transport.clone(), session.clone())))
}

/// Makes the engine's link out of a queue, with as many tables as are asked for and can be had.
pub(crate) fn link<T: Transport, Q: DriverQueue>(
    lender: &Lender<Q>,
    ring: Ring<T, Q>,
    features: Features,
    properties: &Properties,
    config: &Config,
) -> Link<Ring<T, Q>>
where
    Lender<Q>: Clone,
{
    let segments = properties.segments as usize;
    let wanted = segments.min(config.indirect_segments.into());
    let size = ring.wire.queue().size();
    let mut tables = TablePool::empty();
    if features.contains(Features::INDIRECT) && wanted > 0 {
        // With the header and the status.
        let pages = ((wanted + 2) * <Ring<T, Q> as Wire>::Entry::BYTES).div_ceil(PAGE_BYTES);
        let count = config.indirect_requests.min(size);
        let make = |pages| {
            as_many(count.into(), |count| {
                TablePool::new(lender.clone(), count as u16, pages, Access::Read)
            })
        };
        // A table is contiguous in the device's eyes: where pages are not, it has one.
        tables = make(pages).or_else(|| make(1)).unwrap_or_else(TablePool::empty);
    }
    let entries = if tables.count() == 0 { 0 } else { tables.entries_each().min(wanted + 2) };
    let Properties { segment_bytes, ranges, .. } = *properties;
    let page = PAGE_BYTES as u32;
    let segment_bytes = segment_bytes.min((config.segment_bytes / page * page).max(page));
    let limits = limits(size, segments, segment_bytes, entries, ranges);
    Link { wire: ring, limits, tables }
}

/// Makes the pool to bounce through, as large as is asked for and can be had.
pub(crate) fn bounce_pool<S>(lender: &S, config: &Config) -> Option<Arc<Pool<S>>>
where
    S: Share<Handle = Address> + Clone,
{
    let mut bytes = config.bounce_bytes as usize;
    loop {
        let pool = as_many(config.bounce_buffers, |count| Pool::new(lender.clone(), count, bytes));
        if pool.is_some() || config.bounce_buffers == 0 || bytes <= PAGE_BYTES {
            return pool;
        }
        bytes /= 2;
    }
}

/// Tries with half as many until it works.
fn as_many<R>(wanted: u32, make: impl Fn(u32) -> Result<R, PagesError>) -> Option<R> {
    let mut count = wanted;
    while count > 0 {
        match make(count) {
            Ok(made) => return Some(made),
            Err(PagesError::Share(ShareError::BadPage)) => return None,
            Err(_) => count /= 2,
        }
    }
    None
}
