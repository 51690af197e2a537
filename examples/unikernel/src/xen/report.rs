//! What was negotiated, and what was reached.

use xen_blkfront::{Disk, FrontQueue};
use xen_guest::{Guest, println};

/// Prints what the connection came to.
pub fn negotiated(name: &str, disk: &Disk<&'static Guest>) {
    let Some(it) = disk.negotiated() else { return };
    let (geometry, features) = (it.properties.geometry, it.properties.features);
    println!(
        "NEGOTIATED device={name} queues={} order={} segments={} persistent={} sector={} \
         physical={} sectors={} read-only={} flush={} barrier={} discard={} secure-discard={} \
         cdrom={} removable={}",
        it.queues,
        it.ring_order,
        it.indirect_segments,
        u8::from(it.persistent),
        geometry.logical_bytes,
        geometry.physical_bytes,
        geometry.sectors,
        u8::from(geometry.read_only),
        u8::from(features.flush),
        u8::from(features.barrier),
        features.discard.map_or(0, |units| units.granularity * 512),
        u8::from(features.secure_discard),
        u8::from(it.properties.cdrom),
        u8::from(it.properties.removable),
    );
}

/// Prints what the queues and the guest have done so far.
pub fn totals(guest: &Guest, queues: &[FrontQueue<&'static Guest>]) {
    for (number, queue) in queues.iter().enumerate() {
        let it = queue.frontend.statistics();
        let port = queue.line().port().map(|port| guest.port_statistics(port)).unwrap_or_default();
        println!(
            "QUEUE {number}: {} requests, {} on the ring ({} indirect with {} tables), {} bytes, \
             {} notifications sent, {} received",
            it.jobs, it.parts, it.indirect, it.tables, it.bytes, port.sent, port.received
        );
    }
    let it = guest.statistics();
    println!(
        "GUEST {} grants made, {} ended, {} times held; {} upcalls, {} events; {} pages free",
        it.grants_made,
        it.grants_ended,
        it.grants_still_mapped,
        it.upcalls,
        it.events_received,
        it.free_pages
    );
    for (hypercall, count) in xen_hypercalls::count::by_kind() {
        if count > 0 {
            println!("HYPERCALL {hypercall:?} {count}");
        }
    }
}

/// With all disks closed, every page that was granted must have come back.
pub fn nothing_lost(guest: &Guest) -> Result<(), alloc::string::String> {
    let it = guest.statistics();
    if it.grants_made != it.grants_ended {
        return Err(alloc::format!(
            "{} pages were granted, but only {} came back",
            it.grants_made,
            it.grants_ended
        ));
    }
    Ok(())
}
