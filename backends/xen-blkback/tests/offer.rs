//! What frontends publish, and what is understood by it.
#![allow(missing_docs)]

mod xenstore;

use pvblk_xen::back::Layout;
use pvblk_xen::platform::{GrantRef, Port};
use xen_blkback::{Config, Event, QueuePlan, Refusal};
use xenstore::*;

/// What a new vbd makes of these nodes: plans, or a refusal.
fn offer_with(config: &Config, nodes: &[(&str, &str)]) -> Result<Vec<QueuePlan>, Refusal> {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = offered(&rig, &store, config);
    rig.publish(nodes, "3");
    match next(&mut vbd) {
        Event::Connect(plans) => Ok(plans),
        Event::Refused(refusal) => {
            assert_eq!(rig.state(), "5");
            assert_eq!(rig.error(), Some(format!("22 {refusal}")));
            Err(refusal)
        }
        event => panic!("{nodes:?}: {event:?}"),
    }
}

fn offer(nodes: &[(&str, &str)]) -> Result<Vec<QueuePlan>, Refusal> {
    offer_with(&config(|_| {}), nodes)
}

fn with(nodes: &[(&str, &str)]) -> Result<Vec<QueuePlan>, Refusal> {
    offer(&[ONE_RING, nodes].concat())
}

fn references(plan: &QueuePlan) -> Vec<u32> {
    plan.references.iter().map(|reference| reference.0).collect()
}

#[test]
fn a_ring_page_order_even_of_0_makes_it_ring_ref0() {
    let nodes = [("ring-page-order", "0"), ("ring-ref0", "70"), ("ring-ref", "8")];
    assert_eq!(references(&with(&nodes).unwrap()[0]), [70]);
    assert_eq!(references(&with(&[("ring-ref0", "70")]).unwrap()[0]), [8]);
    assert_eq!(with(&[("ring-page-order", "0")]), Err(Refusal::Missing("ring-ref0".into())));
}

#[test]
fn a_ring_of_several_pages_has_them_in_order() {
    for order in 0..=4 {
        let names: Vec<_> = (0..1 << order).map(|page| format!("ring-ref{page}")).collect();
        let values: Vec<_> = (0..1 << order).map(|page| (100 - page).to_string()).collect();
        let mut nodes = vec![("event-channel", "3"), ("protocol", "arm-abi")];
        let order_text = order.to_string();
        nodes.push(("ring-page-order", &order_text));
        nodes.extend(names.iter().zip(&values).map(|(name, value)| (&**name, &**value)));
        let plans = offer(&nodes).unwrap();
        let expected: Vec<u32> = (0..1 << order).map(|page| 100 - page).collect();
        assert_eq!(references(&plans[0]), expected);
    }
}

#[test]
fn one_queue_is_at_the_top_and_several_are_below() {
    let two = [
        ("multi-queue-num-queues", "2"),
        ("queue-0/ring-ref", "20"),
        ("queue-0/event-channel", "4"),
        ("queue-1/ring-ref", "21"),
        ("queue-1/event-channel", "5"),
    ];
    let plans = with(&two).unwrap();
    assert_eq!(plans.len(), 2);
    for (number, plan) in plans.iter().enumerate() {
        assert_eq!(plan.number, number);
        assert_eq!(plan.references, [GrantRef(20 + number as u32)]);
        assert_eq!(plan.port, Port(4 + number as u32));
    }
    // One, even if it is said: the top counts.
    let one = [("multi-queue-num-queues", "1"), ("queue-0/ring-ref", "20")];
    assert_eq!(with(&one).unwrap(), [one_plan()]);
    // Several never are at the top.
    assert_eq!(
        with(&[("multi-queue-num-queues", "2")]),
        Err(Refusal::Missing("queue-0/ring-ref".into()))
    );
    assert_eq!(with(&two[..4]), Err(Refusal::Missing("queue-1/event-channel".into())));
}

#[test]
fn limits_are_kept() {
    let small = config(|c| (c.queues, c.ring_order) = (2, 1));
    let cases: [(&str, &str, Refusal); 8] = [
        ("multi-queue-num-queues", "0", Refusal::Queues { asked: 0, most: 2 }),
        ("multi-queue-num-queues", "3", Refusal::Queues { asked: 3, most: 2 }),
        ("multi-queue-num-queues", "4294967295", Refusal::Queues { asked: u32::MAX, most: 2 }),
        ("multi-queue-num-queues", "4294967296", not_a_number("multi-queue-num-queues")),
        ("ring-page-order", "2", Refusal::RingOrder { asked: 2, most: 1 }),
        // FreeBSD's old backend shifts by it before it looks.
        ("ring-page-order", "32", Refusal::RingOrder { asked: 32, most: 1 }),
        ("ring-page-order", "4294967295", Refusal::RingOrder { asked: u32::MAX, most: 1 }),
        ("ring-page-order", "99999999999999999999", not_a_number("ring-page-order")),
    ];
    for (node, value, refusal) in cases {
        let nodes = [ONE_RING, &[(node, value)]].concat();
        assert_eq!(offer_with(&small, &nodes), Err(refusal), "{node} = {value}");
    }
}

fn not_a_number(node: &str) -> Refusal {
    Refusal::NotANumber(node.into())
}

#[test]
fn nonsense_in_a_number_is_refused() {
    let nodes = ["ring-ref", "event-channel", "multi-queue-num-queues", "ring-page-order"];
    for node in nodes {
        for value in ["", " ", "-1", "+1", "0x10", "1 ", "1\n", "1\0", "a", "1.0", "\u{661}"] {
            assert_eq!(with(&[(node, value)]), Err(not_a_number(node)), "{node} = {value:?}");
        }
        let long = "1".repeat(3000);
        assert_eq!(with(&[(node, &long)]), Err(not_a_number(node)));
    }
}

#[test]
fn missing_nodes_are_refused() {
    for missing in ["ring-ref", "event-channel"] {
        let nodes: Vec<_> = ONE_RING.iter().copied().filter(|(node, _)| *node != missing).collect();
        assert_eq!(offer(&nodes), Err(Refusal::Missing(missing.into())));
    }
}

#[test]
fn the_same_page_twice_is_refused() {
    let twice = [("ring-page-order", "1"), ("ring-ref0", "50"), ("ring-ref1", "50")];
    assert_eq!(with(&twice), Err(Refusal::SamePage(50)));
    let two_queues = |reference, port| {
        with(&[
            ("multi-queue-num-queues", "2"),
            ("queue-0/ring-ref", "20"),
            ("queue-0/event-channel", "4"),
            ("queue-1/ring-ref", reference),
            ("queue-1/event-channel", port),
        ])
    };
    assert_eq!(two_queues("20", "5"), Err(Refusal::SamePage(20)));
    assert_eq!(two_queues("21", "4"), Err(Refusal::SamePort(4)));
    assert!(two_queues("21", "5").is_ok());
}

#[test]
fn layouts_go_by_protocol() {
    for (protocol, layout) in [
        ("x86_64-abi", Layout::Bits64),
        ("x86_32-abi", Layout::Bits32),
        ("arm-abi", Layout::Bits64),
    ] {
        assert_eq!(with(&[("protocol", protocol)]).unwrap()[0].layout, layout);
    }
    for protocol in ["", "x86_64", "native", "X86_64-ABI", "x86_64-abi\n"] {
        assert_eq!(with(&[("protocol", protocol)]), Err(Refusal::Protocol(protocol.into())));
    }
    let long = "x".repeat(2000);
    assert_eq!(with(&[("protocol", &long)]), Err(Refusal::Protocol("x".repeat(32))));
}

#[test]
fn a_missing_protocol_means_what_the_configuration_says() {
    let nodes = [("ring-ref", "8"), ("event-channel", "3")];
    // What Linux's backend takes for it.
    let x86 = cfg!(any(target_arch = "x86", target_arch = "x86_64"));
    let linux = if x86 { Layout::Bits32 } else { Layout::Bits64 };
    assert_eq!(offer(&nodes).unwrap()[0].layout, linux);
    for layout in [Layout::Bits32, Layout::Bits64] {
        let config = config(|c| c.missing_protocol = layout);
        assert_eq!(offer_with(&config, &nodes).unwrap()[0].layout, layout);
    }
}

#[test]
fn a_frontend_that_does_not_let_us_read_is_treated_as_gone() {
    let rig = Rig::new();
    let store = rig.store();
    let mut vbd = connected(&rig, &store);
    // The simulated XenStore lets the backend read that is named here.
    rig.publish(&[("backend-id", "9")], "4");
    rig.set_back("online", "1");
    disconnect(&mut vbd);
    assert_eq!(next(&mut vbd), Event::Removed);
    assert_eq!(rig.state(), "6");
}
