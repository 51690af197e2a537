//! Features: what the device offers, cut down to what is wanted and known (VirtIO 3.1.1).

use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::transport::{Status, Transport};

use crate::config::Config;
use crate::error::Error;
use crate::session;

/// What this driver knows to use, besides the kind of queue.
///
/// Not among it: `NOTIFICATION_DATA` and `RING_RESET`, for which the transports of `virtio-drivers` have
/// no registers; `GEOMETRY`, which says nothing of a disk that has no cylinders; and
/// `ORDER_PLATFORM`, which asks for other barriers than those of processors among themselves.
const KNOWN: Features = Features::from_bits_retain(
    Features::SIZE_MAX.bits()
        | Features::SEG_MAX.bits()
        | Features::READ_ONLY.bits()
        | Features::BLOCK_SIZE.bits()
        | Features::FLUSH.bits()
        | Features::TOPOLOGY.bits()
        | Features::CONFIG_WCE.bits()
        | Features::MULTI_QUEUE.bits()
        | Features::DISCARD.bits()
        | Features::WRITE_ZEROES.bits()
        | Features::LIFETIME.bits()
        | Features::SECURE_ERASE.bits()
        | Features::INDIRECT.bits()
        | Features::EVENT_INDEX.bits()
        | Features::VERSION_1.bits()
        | Features::ACCESS_PLATFORM.bits()
        | Features::IN_ORDER.bits(),
);

/// What to accept of an offer.
fn choose<Q: DriverQueue>(offered: Features, config: &Config) -> Result<Features, Error> {
    let mut wanted = (KNOWN - config.without) | Q::FEATURE;
    if config.queues < 2 {
        wanted -= Features::MULTI_QUEUE;
    }
    if config.indirect_segments == 0 {
        wanted -= Features::INDIRECT;
    }
    if Q::FEATURE.contains(Features::PACKED) {
        // There it lets a device answer several requests by one descriptor, which the queue does not
        // expect.
        wanted -= Features::IN_ORDER;
    }
    let needed = Features::VERSION_1 | Q::FEATURE;
    let lacking = needed - offered;
    if lacking.is_empty() { Ok(offered & wanted) } else { Err(Error::Lacks(lacking)) }
}

/// Resets the device, and agrees with it on features. Its configuration can be read afterwards.
pub(crate) fn negotiate<Q: DriverQueue>(
    transport: &impl Transport,
    config: &Config,
) -> Result<Features, Error> {
    session::reset(transport)?;
    let mut status = Status::ACKNOWLEDGE;
    transport.set_status(status);
    status |= Status::DRIVER;
    transport.set_status(status);
    let features = choose::<Q>(transport.features(), config)?;
    transport.accept(features);
    status |= Status::FEATURES_OK;
    transport.set_status(status);
    let answer = transport.status();
    if answer.is_all() {
        return Err(Error::Removed);
    }
    if answer.contains(Status::FEATURES_OK) { Ok(features) } else { Err(Error::Refused(features)) }
}
