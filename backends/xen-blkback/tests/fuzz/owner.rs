//! The backend's program, in front of a guest that does anything: one vbd and its queues.

use pvblk::extent::Geometry;
use pvblk_simulated::{Faults, Script};
use xen_blkback::{Event, Feature, Queue, QueuePlan, Vbd};

use super::guest::Guest;
use super::raw::{Disk, JournalMemory, World, features};
use super::ring::Served;
use super::steps::Step;
use super::xenstore::{Rig, TheVbd};

/// More messages than this for one call would be work without bounds: it is what it takes to read
/// 64 queues of 16 pages, twice, and all else.
pub const MESSAGES_MAX: u64 = 3000;

/// How queues are opened.
#[derive(Clone, Copy)]
pub struct Opening {
    /// What the vbd is served from.
    pub geometry: Geometry,
    /// With a journal.
    pub journal: bool,
    /// Whether the guest's other thread is at work: then nobody knows what was asked for.
    pub scribbled: bool,
}

/// The owner of a vbd, and what it knows.
pub struct Owner<'w> {
    rig: &'w Rig,
    world: &'w World,
    vbd: TheVbd<'w>,
    opening: Opening,
    /// What it was asked to open, until it is told to drop it.
    plans: Option<Vec<QueuePlan>>,
    pub queues: Vec<Served<'w>>,
    /// Pages of its own that the queues have.
    pages: usize,
    leaving: bool,
    over: bool,
    /// Mappings and copies that fail.
    pub faulty: bool,
}

impl<'w> Owner<'w> {
    pub fn new(rig: &'w Rig, world: &'w World, vbd: TheVbd<'w>, opening: Opening) -> Self {
        Self {
            rig,
            world,
            vbd,
            opening,
            plans: None,
            queues: Vec::new(),
            pages: 0,
            leaving: false,
            over: false,
            faulty: false,
        }
    }

    /// Says what the disk is.
    pub fn insert(&mut self) {
        let (geometry, features) = (self.opening.geometry, features());
        let disk = xen_blkback::Disk { geometry, features, cdrom: false, removable: false };
        self.bounded(|vbd| vbd.insert(disk)).expect("XenStore works");
    }

    /// A call, which costs a bounded number of messages.
    fn bounded<R>(&mut self, call: impl FnOnce(&mut Vbd<&'w pvblk_simulated::Domain>) -> R) -> R {
        let before = self.rig.back.statistics().store_requests;
        let result = call(&mut self.vbd);
        let messages = self.rig.back.statistics().store_requests - before;
        assert!(messages <= MESSAGES_MAX, "{messages} messages");
        result
    }

    fn look(&mut self) -> Event {
        let event = self.bounded(|vbd| vbd.advance(0)).expect("XenStore works");
        assert!(!self.over || event == Event::Nothing, "{event:?} after the end");
        match &event {
            Event::Connect(plans) => {
                assert!(self.plans.is_none() && !self.leaving, "connect while there are queues");
                check_plans(plans);
                self.plans = Some(plans.clone());
            }
            Event::Disconnect => {
                assert!(self.plans.is_some() && !self.leaving, "disconnect without queues");
                self.leaving = true;
            }
            Event::Removed => {
                assert!(self.plans.is_none(), "removed while there are queues");
                self.over = true;
            }
            _ => {}
        }
        event
    }

    /// Does what is to be done. `false` if that was nothing.
    fn obey(&mut self, guest: &Guest) -> bool {
        if self.queues.iter().any(Served::is_dead) && !self.leaving {
            self.refuse();
        }
        let event = self.look();
        match event {
            Event::Connect(_) => self.connected(guest),
            Event::Disconnect => self.disconnected(),
            _ => {}
        }
        event != Event::Nothing
    }

    /// Obeys until there is nothing to do, which is soon.
    fn settle(&mut self, guest: &Guest) {
        assert!((0..8).any(|_| !self.obey(guest)), "never quiet");
    }

    /// Opens what it was asked for.
    fn connected(&mut self, guest: &Guest) {
        let may = self.plans.is_some() && !self.leaving;
        if may && self.queues.is_empty() && !self.open(guest) {
            return self.refuse();
        }
        let connected = self.bounded(|vbd| vbd.connected()).expect("XenStore works");
        assert!(!connected || may);
    }

    fn open(&mut self, guest: &Guest) -> bool {
        let platform = &self.world.back;
        for plan in self.plans.iter().flatten() {
            let disk = Disk::by_hand(self.opening.geometry);
            let sound = guest.is_sound(plan);
            let opened = if self.opening.journal {
                let memory = Box::new(JournalMemory::new(plan.journal_bytes()));
                Queue::open_with(platform, plan, disk.store(), memory)
            } else {
                Queue::open(platform, plan, disk.store())
            };
            match opened {
                Ok(queue) => {
                    // From now on the disk itself finds out who writes to what is read-only.
                    disk.state().geometry.read_only |= plan.restrictions.read_only;
                    let ring = guest.ring(plan);
                    self.queues.push(Served::new(ring, queue, disk, plan, self.opening.scribbled));
                }
                Err(error) => {
                    assert!(!sound || self.faulty, "what is sound is refused: {error}");
                    return false;
                }
            }
        }
        self.pages = platform.statistics().pages;
        true
    }

    fn refuse(&mut self) {
        if self.plans.is_some() && !self.leaving {
            self.drop_queues();
            self.bounded(|vbd| vbd.refuse("no memory", 12)).expect("XenStore works");
        }
    }

    fn disconnected(&mut self) {
        if self.leaving {
            self.drop_queues();
            self.vbd.disconnected();
            self.leaving = false;
        }
    }

    /// Nothing of the frontend stays, and no memory.
    fn drop_queues(&mut self) {
        (self.plans, self.pages) = (None, 0);
        self.queues.clear();
        let left = self.world.back.statistics();
        let left = (left.foreign_pages, left.pages, left.ports);
        assert_eq!(left, (0, 0, 0), "pages of the frontend, own pages, ports");
    }

    /// What all queues together have is bounded.
    pub fn check_memory(&self) {
        let now = self.world.back.statistics();
        let most: usize = self.queues.iter().map(Served::most_mapped).sum();
        assert!(now.foreign_pages <= most, "{} pages are mapped", now.foreign_pages);
        assert_eq!(now.pages, self.pages, "the backend's own memory");
    }

    /// Does one thing to XenStore, or to the vbd.
    pub fn perform(&mut self, guest: &mut Guest, script: &mut Script) {
        let rig = self.rig;
        let removed = rig.back_node("state").is_none();
        let ending = rig.back_node("online").as_deref() == Some("0") && rig.state() == "5";
        let write = |path: String, value: &[u8]| rig.host.store_write(&path, value);
        let step = Step::next(script, &guest.numbers());
        match &step {
            Step::WriteFront(node, value) => write(format!("{}/{node}", rig.front_path()), value),
            Step::WriteBack(node, value) if !removed => {
                write(format!("{}/{node}", rig.path()), value);
            }
            Step::RemoveFront(node) => {
                rig.host.store_remove(&format!("{}/{node}", rig.front_path()));
            }
            Step::RemoveBack(node) => rig.host.store_remove(&format!("{}/{node}", rig.path())),
            Step::FrontState(state) => rig.set_front("state", &state.to_string()),
            Step::BackState(state) if !removed => rig.set_back("state", &state.to_string()),
            Step::Publish(first, count, state) => {
                if self.queues.is_empty() || script.one_in(8) {
                    guest.begin(*first, *count);
                }
                publish(rig, &guest.publication(*first, *count, script), state);
            }
            Step::Detach if !removed => rig.detach(),
            Step::RemoveGuest => rig.remove_guest(),
            Step::RemoveDevice => rig.host.store_remove(&rig.path()),
            Step::Create => rig.create(),
            Step::Obey => drop(self.obey(guest)),
            Step::Refuse => {
                self.look();
                self.refuse();
            }
            Step::Look => drop(self.look()),
            Step::Connected => self.connected(guest),
            Step::Disconnected => self.disconnected(),
            Step::Insert => self.insert(),
            Step::Resize(sectors) => {
                let geometry = Geometry { sectors: *sectors, ..self.opening.geometry };
                self.bounded(|vbd| vbd.resize(geometry)).expect("XenStore works");
            }
            Step::Revoke => {
                self.bounded(|vbd| vbd.revoke(Feature::Discard)).expect("XenStore works");
            }
            Step::Close => self.bounded(|vbd| vbd.close()).expect("XenStore works"),
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

    /// The disk does what it was asked, and everything is answered.
    pub fn finish(&mut self) {
        self.world.back.set_faults(Faults::default());
        self.faulty = false;
        self.queues.iter_mut().for_each(Served::finish);
        self.check_memory();
    }

    /// Both ends become sane: the device connects, if need be after it was made anew.
    pub fn recover(mut self, guest: &Guest) {
        self.disconnected();
        self.settle(guest);
        if self.over || self.vbd.device().frontend_path != self.rig.front_path() {
            return;
        }
        for state in ["5", "6"] {
            // The simulated XenStore lets the backend read, and tells it, that is named here.
            self.rig.publish(&[("backend-id", "2")], state);
            self.settle(guest);
        }
        if !self.over {
            assert!(self.plans.is_none());
            assert_eq!(self.rig.state(), "6");
        }
    }

    /// A guest publishes rings as one does that means well.
    pub fn connect(&mut self, guest: &mut Guest, first: usize, count: usize, script: &mut Script) {
        guest.begin(first, count);
        publish(self.rig, &guest.publication(first, count, script), "3");
        self.settle(guest);
    }

    /// A guest that means well is served.
    pub fn serve_honestly(mut self, guest: &mut Guest) {
        self.connect(guest, guest.rings.len() - 1, 1, &mut Script::new(&[]));
        assert_eq!(self.rig.state(), "4");
        self.queues[0].assert_lives(guest);
        self.refuse();
    }
}

/// What the vbd asks to open can be opened in principle.
fn check_plans(plans: &[QueuePlan]) {
    assert!((1..=64).contains(&plans.len()));
    let mut pages: Vec<_> = plans.iter().flat_map(|plan| plan.references.clone()).collect();
    let count = pages.len();
    assert!(count / plans.len() <= 16 && (count / plans.len()).is_power_of_two());
    pages.sort();
    pages.dedup();
    assert_eq!(pages.len(), count);
}

fn publish(rig: &Rig, nodes: &[(String, String)], state: &str) {
    let nodes: Vec<_> = nodes.iter().map(|(node, value)| (&**node, &**value)).collect();
    rig.publish(&nodes, state);
}
