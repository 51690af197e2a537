//! Telling the backend where our rings are.

use alloc::format;
use alloc::string::String;

use pvblk_xen::abi::{Abi, NativeAbi};
use pvblk_xen::platform::Platform;
use pvblk_xen::store::{Error as StoreError, Nodes, Store, Transaction};
use pvblk_xen::xenbus::{self, State};

use crate::ring::Ring;

/// Publishes the rings and goes to Initialised, all at once.
///
/// A backend tells the forms of the nodes apart by which are there (Linux, QEMU), so that those of
/// an earlier frontend, a boot loader say, must go:
/// * one queue has its nodes in the device's directory, several have them in `queue-N`;
/// * a ring of one page is `ring-ref`, and only a larger one has `ring-page-order` and `ring-refN`.
pub(crate) fn publish<P: Platform>(
    store: &Store<P>,
    path: &str,
    rings: &[Ring<P>],
    order: u32,
    persistent: bool,
) -> Result<(), StoreError> {
    store.transaction(|nodes| {
        for name in nodes.directory(path)? {
            if is_stale(&name, rings.len(), order) {
                nodes.remove(&format!("{path}/{name}"))?;
            }
        }
        if rings.len() > 1 {
            nodes.write_number(&format!("{path}/multi-queue-num-queues"), rings.len() as u64)?;
        }
        if order > 0 {
            nodes.write_number(&format!("{path}/ring-page-order"), order.into())?;
        }
        for (number, ring) in rings.iter().enumerate() {
            let at =
                if rings.len() > 1 { format!("{path}/queue-{number}") } else { String::from(path) };
            publish_ring(nodes, &at, ring, order)?;
        }
        nodes.write(&format!("{path}/protocol"), NativeAbi::PROTOCOL)?;
        nodes.write_number(&format!("{path}/feature-persistent"), persistent.into())?;
        xenbus::write_state(nodes, path, State::Initialised)
    })
}

fn is_stale(name: &str, queues: usize, order: u32) -> bool {
    let single = queues == 1;
    match name {
        "event-channel" => !single,
        "ring-ref" => !single || order > 0,
        "ring-page-order" => order == 0,
        "multi-queue-num-queues" => single,
        _ => name.starts_with("ring-ref") || name.starts_with("queue-"),
    }
}

fn publish_ring<P: Platform>(
    nodes: &Transaction<'_, P>,
    at: &str,
    ring: &Ring<P>,
    order: u32,
) -> Result<(), StoreError> {
    let references = ring.references();
    if order == 0 {
        nodes.write_number(&format!("{at}/ring-ref"), references[0].0.into())?;
    } else {
        for (page, reference) in references.iter().enumerate() {
            nodes.write_number(&format!("{at}/ring-ref{page}"), reference.0.into())?;
        }
    }
    nodes.write_number(&format!("{at}/event-channel"), ring.port.0.into())
}
