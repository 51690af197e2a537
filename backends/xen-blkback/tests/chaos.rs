//! XenStore with anything in it, at any moment.
//!
//! Whatever the nodes are, no panic, a bounded number of messages to `xenstored`, events that fit
//! together, and a device that works again once both ends are sane. The rings are left alone here:
//! `fuzz_corpus.rs` has both.
#![allow(missing_docs)]

mod fuzz;

use fuzz::xenstore::*;
use fuzz::{MESSAGES_MAX, Scope};
use pvblk_simulated::run_random;
use xen_blkback::Event;

#[test]
fn anything_may_be_in_xenstore() {
    run_random(0..200, 200, |bytes| fuzz::run(bytes, Scope::XenStore));
}

/// 64 queues of 16 pages: the most that a frontend can make us read.
#[test]
fn the_largest_offer_is_bounded_work() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, &config(|c| c.queues = 64));
    for queue in 0..64 {
        for page in 0..16 {
            let reference = (queue * 16 + page).to_string();
            rig.set_front(&format!("queue-{queue}/ring-ref{page}"), &reference);
        }
        rig.set_front(&format!("queue-{queue}/event-channel"), &queue.to_string());
    }
    let before = rig.back.statistics().store_requests;
    let nodes =
        [("multi-queue-num-queues", "64"), ("ring-page-order", "4"), ("protocol", "x86_64-abi")];
    rig.publish(&nodes, "4");
    assert_eq!(connect(&mut vbd).len(), 64);
    assert!(rig.back.statistics().store_requests - before < MESSAGES_MAX);
}

/// Watches that fire again and again are a look for each time that XenStore is heard, and take no
/// memory: the frontend writes its state a thousand times, and a node beside it.
#[test]
fn xsa_349_a_storm_of_watches_is_a_few_looks() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    let mut look = || {
        let before = rig.back.statistics().store_requests;
        rig.host.run_until_idle(10_000);
        while next(&mut vbd) != Event::Nothing {}
        rig.back.statistics().store_requests - before
    };
    rig.set_front("state", "4");
    let once = look();
    assert!((1..20).contains(&once), "{once} requests for a look");
    assert_eq!(look(), 0, "there is nothing new");
    for _ in 0..1000 {
        rig.set_front("state", "4");
        rig.set_front("state/below", "1");
    }
    let all: u64 = core::iter::from_fn(|| Some(look()).filter(|requests| *requests > 0)).sum();
    assert!(all <= 4 * once, "{all} requests, where a look takes {once}");
}
