//! One vbd that is served: its life in XenStore, its queues, its medium.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use pvblk::backend::{Store as _, Violation};
use pvblk::command::Features;
use pvblk_xen::store::{Nodes, Store};
use pvblk_xen::xenbus;
use xen_blkback::{Address, Config, Disk, Error, Event, Feature, QueuePlan, Vbd};
use xen_guest::{Guest, println};

use crate::link::{Link, LinkError, Totals};
use crate::medium::{Medium, OwnQueue, RamDisk};
use crate::target::device_name;

/// What is in an error node, as on Linux: no such device, no memory, an argument that makes no
/// sense.
const ENXIO: u32 = 6;
const ENOMEM: u32 = 12;
const EINVAL: u32 = 22;

/// How long what is in flight may take once the frontend is gone, in nanoseconds.
const DRAINING: u64 = 30_000_000_000;

/// How long a vbd that is over keeps its nodes, in nanoseconds. The toolstack waits for the state
/// Closed, and if the node is gone when it looks, that is an error to it.
const LINGERING: u64 = 1_000_000_000;

/// What a vbd is served from.
pub enum Source {
    /// A RAM disk, whatever its name.
    Ram(RamDisk),
    /// A disk of this domain, by its number, with its queues.
    Own(u32, Vec<Rc<RefCell<OwnQueue>>>),
}

impl Source {
    /// The first or the only queue.
    fn first(&self) -> Option<Medium> {
        self.medium(0)
    }

    fn medium(&self, number: usize) -> Option<Medium> {
        Some(match self {
            Self::Ram(disk) => Medium::Ram(disk.clone()),
            Self::Own(_, queues) => Medium::Own(queues.get(number)?.clone()),
        })
    }

    /// The number of the disk of this domain, if it is one.
    pub fn own(&self) -> Option<u32> {
        match self {
            Self::Ram(_) => None,
            Self::Own(number, _) => Some(*number),
        }
    }

    fn most_queues(&self) -> u32 {
        match self {
            Self::Ram(_) => u32::MAX,
            Self::Own(_, queues) => queues.len() as u32,
        }
    }
}

/// What a step of a vbd's life came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do.
    Nothing,
    /// There may be more to do.
    Moved,
    /// It is over: [`Export::end`] it.
    Over,
}

/// What a round of work on a vbd's queues came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// There is nothing more to do now.
    Idle,
    /// There is more.
    More,
    /// The last that was in flight is back, and the queues are gone: the frontend waits for
    /// [`Export::follow`].
    Drained,
}

/// One vbd that is served.
pub struct Export {
    /// Where it is.
    pub address: Address,
    title: String,
    guest: &'static Guest,
    vbd: Vbd<&'static Guest>,
    /// `None` if there is nothing to serve it from (yet).
    source: Option<Source>,
    links: Vec<Link>,
    /// The queue that is worked first the next time.
    turn: usize,
    /// Until when what is in flight may take; the frontend is gone, or nothing is taken from it.
    draining: Option<u64>,
    /// How the frontend broke the rules.
    broken: Option<Violation>,
    /// When its nodes are to go: it is over.
    over_at: Option<u64>,
    /// Everything is to be looked at.
    stirred: bool,
    /// All hypercalls of this domain when it was connected.
    hypercalls: u64,
}

impl Export {
    /// Takes a vbd over, which is served from `source`, if there is one.
    pub fn open(
        guest: &'static Guest,
        store: &Store<&'static Guest>,
        address: Address,
        config: &Config,
        source: Result<Source, String>,
    ) -> Result<Self, Error> {
        let mut config = config.clone();
        if let Ok(source) = &source {
            config.queues = config.queues.min(source.most_queues());
        }
        let vbd = Vbd::open(store, &address.path, &config)?;
        let name = device_name(address.virtual_device);
        let mut export = Self {
            title: format!("{name} of domain {}", address.frontend_id.0),
            address,
            guest,
            vbd,
            source: None,
            links: Vec::new(),
            turn: 0,
            draining: None,
            broken: None,
            over_at: None,
            stirred: false,
            hypercalls: 0,
        };
        match source {
            Ok(source) => export.supply(source)?,
            Err(reason) => {
                // Whoever made the device waits for it in vain, and takes it away.
                println!("{export}: not served: {reason}");
                xenbus::report_error(store, export.vbd.path(), ENXIO, &reason);
            }
        }
        Ok(export)
    }

    fn supply(&mut self, source: Source) -> Result<(), Error> {
        let Some(medium) = source.first() else { return Ok(()) };
        let (geometry, features) = (medium.geometry(), medium.features());
        self.source = Some(source);
        self.vbd.offer()?;
        self.vbd.insert(Disk { geometry, features, cdrom: false, removable: false })?;
        let read_only = self.vbd.disk().is_some_and(|disk| disk.geometry.read_only);
        println!(
            "{self}: {}, {} MiB, sectors of {}{}: waits for its frontend",
            self.medium_name(),
            geometry.sectors >> 11,
            geometry.logical_bytes,
            if read_only { ", read-only" } else { "" },
        );
        Ok(())
    }

    fn medium_name(&self) -> String {
        match &self.source {
            Some(Source::Own(number, _)) => format!("own {}", device_name(*number)),
            Some(Source::Ram(_)) => "RAM".into(),
            None => "nothing".into(),
        }
    }

    /// What it is served from.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// Mappings that all its queues may have at a time.
    pub fn mappings(&self) -> usize {
        self.links.iter().map(Link::mappings).sum()
    }

    /// Whether a frontend is connected.
    pub fn is_connected(&self) -> bool {
        !self.links.is_empty()
    }

    /// Follows the frontend and the toolstack by one step, which never waits for them. `reserved`
    /// mappings are those of all other vbds.
    pub fn follow(&mut self, now: u64, reserved: usize) -> Result<Step, Error> {
        let before = self.vbd.state();
        let event = self.vbd.advance(now)?;
        if self.vbd.state() != before {
            println!("{self}: {before} -> {}", self.vbd.state());
        }
        let happened = event != Event::Nothing;
        match event {
            Event::Connect(plans) => self.connect(&plans, reserved)?,
            Event::Disconnect => self.drain_until(now),
            Event::Refused(refusal) => println!("{self}: refused: {refusal}"),
            Event::Removed => self.over_at = Some(now.saturating_add(LINGERING)),
            _ => {}
        }
        if self.over_at.is_some_and(|deadline| deadline <= now) {
            return Ok(Step::Over);
        }
        if self.draining.is_some_and(|deadline| deadline <= now) {
            println!("{self}: {} does not answer", self.medium_name());
            self.disconnect();
        }
        let moved = happened || self.vbd.deadline() == Some(0);
        Ok(if moved { Step::Moved } else { Step::Nothing })
    }

    fn connect(&mut self, plans: &[QueuePlan], reserved: usize) -> Result<(), Error> {
        self.hypercalls = xen_hypercalls::count::total();
        for plan in plans {
            if let Err(error) = self.open_link(plan, reserved) {
                let errno = match error {
                    LinkError::Memory(_) | LinkError::AddressSpace(_) => ENOMEM,
                    LinkError::Open(_) => EINVAL,
                };
                let reason = error.to_string();
                println!("{self}: refused: {reason}");
                self.links.clear();
                return self.vbd.refuse(&reason, errno);
            }
        }
        if self.vbd.connected()?
            && let Some(it) = self.vbd.negotiated()
        {
            println!(
                "{self}: connected: {} queues of order {}, {} segments, persistent={}, {:?}",
                it.queues,
                it.ring_order,
                it.indirect_segments,
                u8::from(it.persistent),
                it.layout
            );
        }
        Ok(())
    }

    fn open_link(&mut self, plan: &QueuePlan, reserved: usize) -> Result<(), LinkError> {
        let source = self.source.as_ref();
        let medium = |number| source.and_then(|source| source.medium(number));
        // There are as many queues as were offered, at least.
        let Some(served) = medium(plan.number) else { return Err(LinkError::Memory(0)) };
        let reserved = reserved + self.mappings();
        self.links.push(Link::open(self.guest, plan, served, reserved)?);
        Ok(())
    }

    /// Works every queue that has something to do, once; but after one that has more to do than a
    /// round, the others wait for the next call. So a disk with several queues that are busy takes no
    /// more of the time than one with a single queue.
    #[inline]
    pub fn serve(&mut self) -> Round {
        let stirred = core::mem::take(&mut self.stirred);
        if self.draining.is_some() {
            return self.drain();
        }
        let (mut more, mut violation) = (false, None);
        let count = self.links.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            match self.links[index].serve(stirred) {
                Ok(false) => {}
                Ok(true) => {
                    // Those that were not looked at are stirred the next time.
                    (more, self.turn, self.stirred) = (true, index + 1, stirred);
                    break;
                }
                Err(broken) => violation = Some(broken),
            }
        }
        if let Some(violation) = violation {
            println!("{self}: broke the rules: {violation}");
            self.broken = Some(violation);
            self.drain_until(self.guest.now());
            more = true;
        }
        if more { Round::More } else { Round::Idle }
    }

    /// Takes nothing more, and gives what is in flight some time: others are served meanwhile.
    fn drain_until(&mut self, now: u64) {
        self.draining = Some(now.saturating_add(DRAINING));
        self.stirred = true;
    }

    #[cold]
    fn drain(&mut self) -> Round {
        let (mut over, mut awake) = (true, false);
        for link in &mut self.links {
            over &= link.drain();
            awake |= link.is_awake();
        }
        if over {
            self.disconnect();
            return Round::Drained;
        }
        if awake { Round::More } else { Round::Idle }
    }

    fn disconnect(&mut self) {
        self.draining = None;
        self.drop_links();
        let Some(violation) = self.broken.take() else { return self.vbd.disconnected() };
        if let Err(error) = self.vbd.refuse(&violation.to_string(), EINVAL) {
            println!("{self}: {error}");
        }
    }

    /// Drops the queues, with everything of the frontend that is mapped, and says what they have
    /// come to.
    fn drop_links(&mut self) {
        if self.links.is_empty() {
            return;
        }
        let mut totals = Totals::default();
        self.links.iter().for_each(|link| link.add_to(&mut totals));
        let before = self.guest.statistics().foreign_pages;
        self.links.clear();
        let unmapped = before - self.guest.statistics().foreign_pages;
        let hypercalls = xen_hypercalls::count::total() - self.hypercalls;
        totals.print(&self.title, unmapped, hypercalls);
    }

    /// Everything in flight is to be looked at.
    pub fn stir(&mut self) {
        self.stirred = true;
    }

    /// The medium has another size.
    pub fn resize(&mut self) -> Result<(), Error> {
        self.stirred = true;
        let Some(medium) = self.source.as_ref().and_then(Source::first) else { return Ok(()) };
        self.links.iter_mut().for_each(Link::refresh);
        self.vbd.resize(medium.geometry())
    }

    /// Asks the frontend to close the disk.
    pub fn close(&mut self) -> Result<(), Error> {
        self.vbd.close()
    }

    /// Gives up pages that are kept without need, and takes back features that turned out not to
    /// work.
    pub fn tidy(&mut self, now: u64) -> Result<(), Error> {
        self.links.iter_mut().for_each(|link| link.tidy(now));
        let (Some(disk), Some(first)) = (self.vbd.disk(), self.links.first()) else {
            return Ok(());
        };
        let works =
            self.links.iter().fold(first.features(), |all, link| both(all, link.features()));
        let lost = [
            (Feature::Flush, disk.features.flush && !works.flush),
            (Feature::Discard, disk.features.discard.is_some() && works.discard.is_none()),
            (Feature::SecureDiscard, disk.features.secure_discard && !works.secure_discard),
        ];
        for (feature, is_lost) in lost {
            if is_lost {
                println!("{self}: {feature:?} does not work");
                self.vbd.revoke(feature)?;
            }
        }
        Ok(())
    }

    /// When [`follow`](Self::follow) has something to do without an event of XenStore.
    pub fn deadline(&self) -> Option<u64> {
        let own = self.draining.into_iter().chain(self.over_at);
        own.chain(self.vbd.deadline()).min()
    }

    /// It is over: removes its nodes, for which the toolstack waits. Gives back what it was served
    /// from.
    pub fn end(mut self) -> Option<Source> {
        self.drop_links();
        let source = self.source.take();
        let title = core::mem::take(&mut self.title);
        match self.vbd.remove() {
            Ok(_) => println!("{title}: over"),
            Err(error) => println!("{title}: over: {error}"),
        }
        source
    }
}

impl core::fmt::Display for Export {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.title)
    }
}

fn both(one: Features, other: Features) -> Features {
    Features {
        flush: one.flush && other.flush,
        barrier: one.barrier && other.barrier,
        discard: one.discard.and(other.discard),
        secure_discard: one.secure_discard && other.secure_discard,
        write_zeroes: one.write_zeroes && other.write_zeroes,
    }
}

/// What is at `path`, as the toolstack describes it: `target=` of `xl`'s `disk`.
pub fn target(store: &Store<&'static Guest>, path: &str) -> Result<String, Error> {
    Ok(store.read_optional(&format!("{path}/params"))?.unwrap_or_default())
}
