//! The one loop in which everything happens.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use pvblk_xen::platform::EventChannels;
use pvblk_xen::store::{Nodes, Store};
use xen_blkback::{Address, Backends, Change, Error, Quota};
use xen_guest::{Guest, println};

use crate::bell::Bell;
use crate::export::{self, Export, Round, Step};
use crate::media::Media;
use crate::own_disk::News;
use crate::settings::Settings;
use crate::shutdown::{End, Shutdown};

/// How often pages that are kept without need are looked for, in nanoseconds: while there is
/// something to do, and while there is not.
const TIDY_BUSY: u64 = 100_000_000;
const TIDY_IDLE: u64 = 10_000_000_000;
/// How soon XenStore is asked again that failed.
const RETRY: u64 = 1_000_000_000;
/// How long guests have to close their disks when this domain is to end.
const ENDING: u64 = 15_000_000_000;
/// Rounds of work between two looks at the clock, while there is something to do all the time.
const ROUNDS: u32 = 64;

/// Everything that this domain has to look after.
pub struct Domain {
    guest: &'static Guest,
    store: Store<&'static Guest>,
    settings: Settings,
    media: Media,
    backends: Backends<&'static Guest>,
    shutdown: Shutdown,
    exports: Vec<Export>,
    bell: Bell,
    /// When to look after everything, even if nobody rings.
    look_at: Option<u64>,
    tidy_at: u64,
    /// Whether queues were worked since they were tidied.
    worked: bool,
    /// How this domain is to end, and when at the latest.
    ending: Option<(End, u64)>,
    /// The last trouble with XenStore, to say it once.
    trouble: Option<Error>,
}

impl Domain {
    /// Makes what is to be served, and begins to look for those who want it.
    pub fn open(guest: &'static Guest) -> Result<Self, Error> {
        let settings = Settings::parse(guest.command_line());
        if !settings.unknown.is_empty() {
            println!("the command line: not understood: {}", settings.unknown.join(" "));
        }
        let store = Store::new(guest);
        let bell = Bell::new();
        let media = Media::open(guest, &store, &settings, bell.waker())?;
        let root = format!("/local/domain/{}/backend/vbd", store.read("domid")?);
        let backends = Backends::open(&store, &root, Quota::default())?;
        let shutdown = Shutdown::watch(&store)?;
        let config = &settings.config;
        println!(
            "ready: {root}; queues={} order={} segments={} persistent={} kept={} path={:?}; {} pages \
             free",
            config.queues,
            config.ring_order,
            config.indirect_segments,
            u8::from(config.persistent),
            config.kept_pages,
            config.data_path,
            guest.statistics().free_pages
        );
        Ok(Self {
            guest,
            store,
            settings,
            media,
            backends,
            shutdown,
            exports: Vec::new(),
            bell,
            look_at: None,
            tidy_at: 0,
            worked: false,
            ending: None,
            trouble: None,
        })
    }

    /// Serves until the toolstack asks for an end.
    pub fn run(&mut self) -> End {
        let mut rounds = 0;
        loop {
            let mut busy = false;
            for export in &mut self.exports {
                let round = export.serve();
                busy |= round != Round::Idle;
                if round == Round::Drained {
                    self.bell.ring();
                }
            }
            self.worked |= busy;
            rounds += 1;
            let is_time = !busy || rounds >= ROUNDS;
            if self.bell.is_rung() || is_time && self.is_due() {
                rounds = 0;
                if let Some(end) = self.look() {
                    return end;
                }
                // While XenStore was waited for, events of queues may have ended those waits: the
                // queues are looked at again before the next sleep.
                continue;
            }
            if is_time {
                rounds = 0;
            }
            if !busy {
                self.worked = true;
                self.guest.wait(self.look_at);
            }
        }
    }

    fn is_due(&self) -> bool {
        self.look_at.is_some_and(|at| at <= self.guest.now())
    }

    /// Looks after everything but the queues. How the domain is to end, if it is time for that.
    fn look(&mut self) -> Option<End> {
        let now = self.guest.now();
        let result = self.follow(now);
        self.bell.arm(self.guest);
        let pending = self.store.poll();
        let deadlines = self.exports.iter().filter_map(Export::deadline);
        self.look_at = deadlines.chain(self.ending.map(|(_, deadline)| deadline)).min();
        if self.exports.iter().any(Export::is_connected) {
            self.look_at = self.look_at.into_iter().chain([self.tidy_at]).min();
        }
        match (result, pending) {
            (Ok(moved), Ok(pending)) => {
                self.trouble = None;
                if moved || pending {
                    self.bell.ring();
                }
            }
            (Err(error), _) => self.retry(error, now),
            (_, Err(error)) => self.retry(error.into(), now),
        }
        let (end, deadline) = self.ending?;
        (self.exports.is_empty() || deadline <= now).then(|| self.end(end))
    }

    fn retry(&mut self, error: Error, now: u64) {
        // Whatever rang before: later.
        self.look_at = Some(now.saturating_add(RETRY));
        if self.trouble.as_ref() != Some(&error) {
            println!("XenStore: {error}");
            self.trouble = Some(error);
        }
    }

    /// `true` if there may be more to do.
    fn follow(&mut self, now: u64) -> Result<bool, Error> {
        let mut moved = false;
        while let Some(change) = self.backends.advance()? {
            match change {
                Change::Appeared(address) => self.appear(address)?,
                // The vbd notices by itself.
                Change::Disappeared(_) => {}
            }
            moved = true;
        }
        moved |= self.follow_own_disks()?;
        moved |= self.follow_exports(now)?;
        if self.tidy_at <= now {
            self.tidy_at = now + if self.worked { TIDY_BUSY } else { TIDY_IDLE };
            self.worked = false;
            for export in &mut self.exports {
                export.tidy(now)?;
            }
        }
        if let Some(end) = self.shutdown.asked(&self.store)? {
            self.ending = Some((end, now.saturating_add(ENDING)));
            for export in &mut self.exports {
                export.close()?;
            }
            moved = true;
        }
        Ok(moved)
    }

    fn appear(&mut self, address: Address) -> Result<(), Error> {
        if self.ending.is_some() || self.exports.iter().any(|export| export.address == address) {
            // When the old one in this place has ended, the new one appears again.
            return Ok(());
        }
        let target = export::target(&self.store, &address.path)?;
        let source = self.media.find(&target);
        let config = &self.settings.config;
        let place = address.path.clone();
        match Export::open(self.guest, &self.store, address, config, source) {
            Ok(export) => self.exports.push(export),
            Err(error) => println!("{place}: {error}"),
        }
        Ok(())
    }

    fn follow_exports(&mut self, now: u64) -> Result<bool, Error> {
        let mut moved = false;
        let mut index = 0;
        while let Some(export) = self.exports.get(index) {
            let all: usize = self.exports.iter().map(Export::mappings).sum();
            let others = all - export.mappings();
            match self.exports[index].follow(now, others)? {
                Step::Nothing => index += 1,
                Step::Moved => {
                    moved = true;
                    index += 1;
                }
                Step::Over => {
                    moved = true;
                    let export = self.exports.swap_remove(index);
                    self.end_export(export);
                }
            }
        }
        Ok(moved)
    }

    fn end_export(&mut self, export: Export) {
        let address = export.address.clone();
        if let Some(source) = export.end()
            && self.media.release(source)
        {
            self.try_again();
            self.media.close(false);
        }
        self.backends.forget(&address);
        if self.exports.iter().all(|export| export.address.frontend_id != address.frontend_id) {
            let statistics = self.guest.statistics();
            println!(
                "domain {}: has no more disks; pages of all guests that are mapped: {}; {} pages free",
                address.frontend_id.0, statistics.foreign_pages, statistics.free_pages
            );
        }
    }

    /// Those who could not be served may be now: they appear again.
    fn try_again(&mut self) {
        let backends = &mut self.backends;
        self.exports.retain(|export| {
            let waits = export.source().is_none();
            if waits {
                backends.forget(&export.address);
            }
            !waits
        });
    }

    /// `true` if there may be more to do.
    fn follow_own_disks(&mut self) -> Result<bool, Error> {
        let come = self.ending.is_none() && self.media.arrive()?;
        if come {
            self.try_again();
        }
        let mut trouble = None::<String>;
        for disk in &mut self.media.own {
            let news = disk.follow().unwrap_or_else(|reason| {
                trouble = Some(reason);
                News::Nothing
            });
            let number = Some(disk.number);
            let served =
                |export: &&mut Export| number == export.source().and_then(export::Source::own);
            let mut served = self.exports.iter_mut().filter(served);
            match news {
                News::Nothing => {}
                News::Stirred => served.for_each(Export::stir),
                News::Resized => served.try_for_each(Export::resize)?,
                News::Leaving => served.try_for_each(Export::close)?,
            }
        }
        if let Some(trouble) = trouble {
            println!("{trouble}");
        }
        self.media.close(false);
        Ok(come)
    }

    /// Lets go of everything.
    fn end(&mut self, end: End) -> End {
        for export in core::mem::take(&mut self.exports) {
            println!("{export}: its guest still has it");
        }
        self.media.close(true);
        end
    }
}
