//! XenStore with anything in it, at any moment.
//!
//! Whatever the nodes are, no panic, a bounded number of messages to `xenstored`, events that fit
//! together, and a device that works again once both ends are sane.
#![allow(missing_docs)]

mod xenstore;

use proptest::collection::vec;
use proptest::prelude::*;
use xen_blkback::{Event, Feature, Hotplug, Vbd};
use xenstore::*;

/// More messages than this for one call would be work without bounds: it is what it takes to read
/// 64 queues of 16 pages, twice, and all else.
const MESSAGES_MAX: u64 = 3000;

#[derive(Clone, Debug)]
enum Step {
    WriteFront(usize, Vec<u8>),
    WriteBack(usize, Vec<u8>),
    RemoveFront(usize),
    RemoveBack(usize),
    FrontState(u8),
    BackState(u8),
    Publish(bool),
    Detach,
    RemoveGuest,
    RemoveDevice,
    Create,
    /// Look, and do what is asked for.
    Obey,
    /// Look, and say that the queues cannot be opened.
    Refuse,
    /// Look, and take one's time.
    Look,
    Connected,
    Disconnected,
    Insert,
    Resize(u64),
    Revoke,
    Close,
}

const FRONT_NODES: [&str; 12] = [
    "state",
    "protocol",
    "feature-persistent",
    "multi-queue-num-queues",
    "ring-page-order",
    "ring-ref",
    "ring-ref0",
    "ring-ref1",
    "event-channel",
    "queue-0/ring-ref",
    "queue-1/event-channel",
    "backend-id",
];

const BACK_NODES: [&str; 10] = [
    "state",
    "online",
    "mode",
    "hotplug-status",
    "frontend",
    "frontend-id",
    "multi-queue-max-queues",
    "max-ring-page-order",
    "feature-max-indirect-segments",
    "feature-persistent",
];

fn value() -> impl Strategy<Value = Vec<u8>> {
    let usual = [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
        "9",
        "16",
        "32",
        "64",
        "65",
        "4294967295",
        "4294967296",
        "-1",
        "",
        "connected",
        "error",
        "x86_64-abi",
        "x86_32-abi",
        "w",
        "r",
        "a/b",
    ];
    prop_oneof![
        8 => proptest::sample::select(usual.to_vec()).prop_map(|text| text.as_bytes().to_vec()),
        1 => vec(any::<u8>(), 0..40),
        1 => Just(vec![b'9'; 2000]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let front = 0..FRONT_NODES.len();
    let back = 0..BACK_NODES.len();
    prop_oneof![
        6 => (front.clone(), value()).prop_map(|(node, value)| Step::WriteFront(node, value)),
        2 => (back.clone(), value()).prop_map(|(node, value)| Step::WriteBack(node, value)),
        2 => front.prop_map(Step::RemoveFront),
        1 => back.prop_map(Step::RemoveBack),
        8 => (0..9u8).prop_map(Step::FrontState),
        1 => (0..9u8).prop_map(Step::BackState),
        6 => any::<bool>().prop_map(Step::Publish),
        1 => Just(Step::Detach),
        1 => Just(Step::RemoveGuest),
        1 => Just(Step::RemoveDevice),
        2 => Just(Step::Create),
        16 => Just(Step::Obey),
        2 => Just(Step::Refuse),
        4 => Just(Step::Look),
        2 => Just(Step::Connected),
        2 => Just(Step::Disconnected),
        2 => Just(Step::Insert),
        1 => (0..99u64).prop_map(Step::Resize),
        1 => Just(Step::Revoke),
        1 => Just(Step::Close),
    ]
}

/// The owner of a vbd, and what it knows.
struct Owner<'t> {
    rig: &'t Rig,
    vbd: TheVbd<'t>,
    holding: bool,
    leaving: bool,
    over: bool,
}

impl Owner<'_> {
    /// A call, which costs a bounded number of messages.
    fn bounded<R>(&mut self, call: impl FnOnce(&mut TheVbd<'_>) -> R) -> R {
        let before = self.rig.back.statistics().waits;
        let result = call(&mut self.vbd);
        let messages = self.rig.back.statistics().waits - before;
        assert!(messages <= MESSAGES_MAX, "{messages} messages");
        result
    }

    fn look(&mut self) -> Event {
        let event = self.bounded(|vbd| vbd.advance(0)).expect("XenStore works");
        assert!(!self.over || event == Event::Nothing, "{event:?} after the end");
        match &event {
            Event::Connect(plans) => {
                assert!(!self.holding && !self.leaving, "connect while there are queues");
                assert!((1..=64).contains(&plans.len()));
                let mut pages: Vec<_> =
                    plans.iter().flat_map(|plan| plan.references.clone()).collect();
                let count = pages.len();
                assert!(count / plans.len() <= 16 && (count / plans.len()).is_power_of_two());
                pages.sort();
                pages.dedup();
                assert_eq!(pages.len(), count);
                self.holding = true;
            }
            Event::Disconnect => {
                assert!(self.holding && !self.leaving, "disconnect without queues");
                self.leaving = true;
            }
            Event::Removed => {
                assert!(!self.holding, "removed while there are queues");
                self.over = true;
            }
            _ => {}
        }
        event
    }

    fn obey(&mut self) {
        match self.look() {
            Event::Connect(_) => {
                let _ = self.bounded(|vbd| vbd.connected()).expect("XenStore works");
            }
            Event::Disconnect => self.disconnected(),
            _ => {}
        }
    }

    fn refuse(&mut self) {
        self.look();
        if self.holding && !self.leaving {
            self.bounded(|vbd| vbd.refuse("no memory", 12)).expect("XenStore works");
            self.holding = false;
        }
    }

    fn disconnected(&mut self) {
        if self.leaving {
            self.vbd.disconnected();
            (self.holding, self.leaving) = (false, false);
        }
    }
}

fn perform(owner: &mut Owner<'_>, step: &Step) {
    let rig = owner.rig;
    let removed = rig.back_node("state").is_none();
    let ending = rig.back_node("online").as_deref() == Some("0") && rig.state() == "5";
    let write = |path: String, value: &[u8]| rig.host.store_write(&path, value);
    match step {
        Step::WriteFront(node, value) => {
            write(format!("{}/{}", rig.front_path(), FRONT_NODES[*node]), value);
        }
        Step::WriteBack(node, value) if !removed => {
            write(format!("{}/{}", rig.path(), BACK_NODES[*node]), value);
        }
        Step::RemoveFront(node) => {
            rig.host.store_remove(&format!("{}/{}", rig.front_path(), FRONT_NODES[*node]));
        }
        Step::RemoveBack(node) => {
            rig.host.store_remove(&format!("{}/{}", rig.path(), BACK_NODES[*node]));
        }
        Step::FrontState(state) => rig.set_front("state", &state.to_string()),
        Step::BackState(state) if !removed => rig.set_back("state", &state.to_string()),
        Step::Publish(other) => {
            rig.publish(ONE_RING, "3");
            if *other {
                rig.publish(&[("ring-ref", "99")], "4");
            }
        }
        Step::Detach if !removed => rig.detach(),
        Step::RemoveGuest => rig.remove_guest(),
        Step::RemoveDevice => rig.host.store_remove(&rig.path()),
        Step::Create => rig.create(),
        Step::Obey => owner.obey(),
        Step::Refuse => owner.refuse(),
        Step::Look => drop(owner.look()),
        Step::Connected => {
            let connected = owner.bounded(|vbd| vbd.connected()).expect("XenStore works");
            assert!(!connected || (owner.holding && !owner.leaving));
        }
        Step::Disconnected => owner.disconnected(),
        Step::Insert => owner.bounded(|vbd| vbd.insert(disk())).expect("XenStore works"),
        Step::Resize(sectors) => {
            let geometry = pvblk::extent::Geometry { sectors: *sectors, ..disk().geometry };
            owner.bounded(|vbd| vbd.resize(geometry)).expect("XenStore works");
        }
        Step::Revoke => {
            owner.bounded(|vbd| vbd.revoke(Feature::Discard)).expect("XenStore works");
        }
        Step::Close => owner.bounded(|vbd| vbd.close()).expect("XenStore works"),
        _ => {}
    }
    // The toolstack's wish to end it stands.
    if ending && !matches!(step, Step::Create | Step::WriteBack(..) | Step::BackState(_)) {
        assert!(["5", "6", ""].contains(&&*rig.state()), "{} after {step:?}", rig.state());
    }
    // What is removed is not made anew by us.
    let made = removed && rig.back_node("state").is_some();
    assert!(!made || matches!(step, Step::Create | Step::WriteBack(..)), "{step:?}");
}

/// Both ends become sane: the device connects, if need be after it was made anew.
fn recovers(rig: &Rig, mut owner: Owner<'_>) {
    owner.disconnected();
    for _ in 0..8 {
        owner.obey();
    }
    if owner.over || owner.vbd.device().frontend_path != rig.front_path() {
        return;
    }
    for state in ["5", "6"] {
        // The simulated XenStore lets the backend read, and tells it, that is named here.
        rig.publish(&[("backend-id", "2")], state);
        for _ in 0..4 {
            owner.obey();
        }
    }
    if !owner.over {
        assert!(!owner.holding);
        assert_eq!(rig.state(), "6");
    }
}

fn run(steps: &[Step], hotplug: Hotplug) {
    let rig = Rig::new();
    let store = rig.store();
    {
        let config = config(|c| (c.hotplug, c.queues) = (hotplug, 64));
        let mut vbd = Vbd::open(&store, &rig.path(), &config).expect("a new device");
        vbd.offer().expect("XenStore works");
        vbd.insert(disk()).expect("XenStore works");
        let mut owner = Owner { rig: &rig, vbd, holding: false, leaving: false, over: false };
        for step in steps {
            perform(&mut owner, step);
        }
        recovers(&rig, owner);
    }
    // And a new one is served as if nothing had been.
    rig.host.store_remove(&rig.path());
    rig.host.store_remove(&rig.front_path());
    rig.create();
    let mut vbd = offered(&rig, &store, &config(|_| {}));
    rig.publish(ONE_RING, "3");
    connect(&mut vbd);
    assert_eq!(rig.state(), "4");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn anything_may_be_in_xenstore(steps in vec(step(), 0..60), script in any::<bool>()) {
        run(&steps, if script { Hotplug::Script } else { Hotplug::Ours });
    }
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
    let before = rig.back.statistics().waits;
    let nodes =
        [("multi-queue-num-queues", "64"), ("ring-page-order", "4"), ("protocol", "x86_64-abi")];
    rig.publish(&nodes, "4");
    assert_eq!(connect(&mut vbd).len(), 64);
    assert!(rig.back.statistics().waits - before < MESSAGES_MAX);
    // A thousand times the same is one look.
    for _ in 0..1000 {
        rig.set_front("state", "4");
    }
    let before = rig.back.statistics().waits;
    rig.host.run_until_idle(10_000);
    while next(&mut vbd) != Event::Nothing {}
    assert!(rig.back.statistics().waits - before < MESSAGES_MAX);
}
