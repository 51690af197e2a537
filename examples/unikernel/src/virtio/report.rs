//! What was negotiated, and what was reached.

use pvblk_virtio::feature::Features;
use qemu_virt::{Guest, Place, println};
use virtio_blk_driver::Negotiated;

use crate::image::Queue;

/// Prints what the connection came to.
pub fn negotiated(name: &str, place: Place, it: &Negotiated) {
    let (geometry, features) = (it.properties.geometry, it.properties.features);
    let has = |feature| u8::from(it.features.contains(feature));
    println!(
        "NEGOTIATED device={name} queues={} size={} segments={} packed={} indirect={} \
         event-index={} in-order={} sector={} physical={} sectors={} read-only={} flush={} \
         write-cache={} discard={} write-zeroes={} secure-discard={} features={:#x}",
        it.queues,
        it.queue_size,
        it.indirect_segments,
        has(Features::PACKED),
        has(Features::INDIRECT),
        has(Features::EVENT_INDEX),
        has(Features::IN_ORDER),
        geometry.logical_bytes,
        geometry.physical_bytes,
        geometry.sectors,
        u8::from(geometry.read_only),
        u8::from(features.flush),
        it.properties.write_cache.map_or(-1, i8::from),
        features.discard.map_or(0, |units| units.granularity * 512),
        u8::from(features.write_zeroes),
        u8::from(features.secure_discard),
        it.features.bits(),
    );
    println!("PLACE device={name} at {place}");
    if let Some(lifetime) = it.lifetime {
        println!("LIFETIME device={name} {lifetime:?}");
    }
}

/// Prints what the queues and the guest have done so far.
pub fn totals<Q>(guest: &Guest, queues: &[Queue<Q>])
where
    Q: pvblk_virtio::queue::DriverQueue,
{
    for (number, queue) in queues.iter().enumerate() {
        let it = queue.frontend.statistics();
        println!(
            "QUEUE {number}: {} requests, {} on the ring ({} indirect with {} tables), {} bytes, \
             {} notifications sent, {} interrupts",
            it.jobs,
            it.parts,
            it.indirect,
            it.tables,
            it.bytes,
            it.notifications,
            queue.line().interrupt().statistics().received
        );
    }
    println!("GUEST {} interrupts; {} pages free", guest.interrupts(), guest.free_pages());
}
