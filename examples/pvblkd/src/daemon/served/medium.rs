//! Opening what a disk is served from, on a thread of its own, again and again until it is there.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result, anyhow, bail};
use pvblk::extent::SECTOR_BYTES;
use pvblk_xen::platform::DomainId;
use pvblk_xen::store::Nodes;
use pvblk_xen::xenbus;
use xen_blkback::Disk;

use super::{Message, Served};
use crate::backing::Backing;
use crate::host::Host;
use crate::opening::Opening;
use crate::promise::{self, Opened};
use crate::source::Source;
use crate::toolstack;

/// What Linux calls an error of input or output.
const EIO: u32 = 5;

/// How long to wait before a medium that could not be opened is tried again, in nanoseconds: twice as
/// long each time, up to a minute.
const FIRST_RETRY: u64 = 1_000_000_000;
const LAST_RETRY: u64 = 60_000_000_000;

/// How `xl` ends the name of a guest that moves here, until the one that it moves from is gone.
const INCOMING: &str = "--incoming";

/// What a disk is served from.
pub(super) struct Medium {
    state: State,
    /// Whether the guest has used the disk already: it must find what it left there.
    is_old: bool,
    /// Whether it is opened as the guest was told, and not as it is configured.
    is_bent: bool,
    /// Whether the error that is shown is the medium's.
    has_failed: bool,
    /// It is to be opened once more: what it is being opened for is over.
    is_stale: bool,
    /// How long to wait after the next failure.
    patience: u64,
    /// Why it could not be opened, if the toolstack was not told yet.
    untold: Option<String>,
}

enum State {
    /// Not yet: the toolstack's script prepares it.
    Awaited,
    /// A thread opens it.
    Opening,
    /// It is open; the vbd does not know yet.
    Open(Opened),
    /// The vbd knows it.
    Inserted(Backing),
    /// It could not be opened just now.
    Failed,
    /// It is tried again at that time.
    Waiting(u64),
}

impl Medium {
    pub fn new(is_old: bool) -> Self {
        Self {
            state: State::Awaited,
            is_old,
            is_bent: false,
            has_failed: false,
            is_stale: false,
            patience: FIRST_RETRY,
            untold: None,
        }
    }

    /// What it is, once that is open.
    pub fn backing(&self) -> Option<&Backing> {
        match &self.state {
            State::Open(Opened { backing, .. }) | State::Inserted(backing) => Some(backing),
            _ => None,
        }
    }

    /// Whether a thread opens it.
    pub fn is_opening(&self) -> bool {
        matches!(self.state, State::Opening)
    }

    /// When there is something to do without an event.
    pub fn deadline(&self) -> Option<u64> {
        match self.state {
            State::Open(_) | State::Failed => Some(0),
            State::Waiting(at) => Some(at),
            _ => None,
        }
    }
}

impl<H: Host> Served<'_, H> {
    /// Has a thread open what the disk is served from.
    pub(super) fn open_medium(&mut self) {
        self.medium.state = State::Opening;
        if let Err(error) = self.begin_to_open() {
            self.opened(Err(error));
        }
    }

    /// Has it opened now rather than later, if it could not be so far.
    pub(super) fn reopen_medium(&mut self) {
        match self.medium.state {
            State::Opening => self.medium.is_stale = true,
            State::Failed | State::Waiting(_) => self.open_medium(),
            State::Awaited | State::Open(_) | State::Inserted(_) => {}
        }
    }

    fn begin_to_open(&mut self) -> Result<()> {
        let medium = self.vbd.medium()?;
        let params = medium.physical_path.unwrap_or(medium.params);
        if params.is_empty() {
            bail!("there is no medium in the drive");
        }
        let source: Source = params.parse()?;
        if let Some(reason) = &self.misfit {
            bail!("{reason}");
        }
        let restrictions = self.vbd.device().restrictions;
        let guest = toolstack::domain_name(&self.store, DomainId(self.name.domain));
        let mut opening = Opening {
            name: self.name.clone(),
            path: self.path().into(),
            options: self.options.clone(),
            read_only: restrictions.read_only || self.options.read_only.unwrap_or_default(),
            keep: self.medium.is_old,
            arriving: guest.ends_with(INCOMING),
            promised: false,
        };
        self.medium.is_bent = false;
        // A server has to allow the connections of all queues that the guest may have by now.
        if matches!(source, Source::Nbd(_)) && opening.options.queues < Some(self.vbd.max_queues())
        {
            opening.options.queues = Some(self.vbd.max_queues());
            self.medium.is_bent = true;
        }
        if let Some(promise) = self.vbd.promise() {
            let configured = opening.clone();
            opening.promised = true;
            // What the guest was told counts more than what was configured since.
            opening.read_only = promise.read_only;
            // A server has its own.
            if !matches!(source, Source::Nbd(_)) {
                opening.options.sector = Some(promise.logical_bytes);
            }
            let sector = configured.options.sector.unwrap_or(SECTOR_BYTES);
            self.medium.is_bent |= opening.read_only != configured.read_only
                || opening.options.sector.is_some_and(|told| told != sector);
        }
        let (common, disk) = (self.common.clone(), self.id);
        let work = move || {
            let open = || promise::open(&opening, &source, &common.runtime, &common.named);
            let result = catch_unwind(AssertUnwindSafe(open));
            let result = result.unwrap_or_else(|_| Err(anyhow!("a fault of pvblkd")));
            common.mailbox.send(Message::Opened { disk, result });
        };
        let builder = std::thread::Builder::new().name("open".into());
        builder.spawn(work).context("no thread to open the disk")?;
        Ok(())
    }

    /// The thread has opened it, or has not.
    pub fn opened(&mut self, result: Result<Opened>) {
        if std::mem::take(&mut self.medium.is_stale) && !self.is_gone {
            drop(result);
            return self.open_medium();
        }
        match result {
            Ok(opened) => {
                let backing = &opened.backing;
                let failures = backing.failure_counter();
                self.status.update(|condition| {
                    condition.source = backing.source().to_string();
                    condition.medium_errors = failures;
                });
                self.medium.state = State::Open(opened);
            }
            Err(error) => self.medium_refused(format!("{error:#}")),
        }
    }

    /// It cannot be served, for now.
    fn medium_refused(&mut self, reason: String) {
        // Not every time that it is tried.
        if self.medium.patience == FIRST_RETRY {
            log::warn!("{}: {reason}", self.path());
        }
        self.note_error(&reason);
        self.medium.has_failed = true;
        self.medium.untold = Some(reason);
        self.medium.state = State::Failed;
    }

    /// The guest has let go of the disk that it was promised: what is configured now counts.
    pub(super) fn forget_promise(&mut self) {
        match self.medium.state {
            State::Open(_) | State::Inserted(_) if self.medium.is_bent => {
                self.vbd.eject();
                self.open_medium();
            }
            // It was refused because of the promise, as like as not.
            _ => self.reopen_medium(),
        }
    }

    /// Tells the vbd, or the toolstack, what became of the medium.
    pub(super) fn advance_medium(&mut self, now: u64) -> Result<(), xen_blkback::Error> {
        match &self.medium.state {
            State::Open(Opened { backing, identity }) => {
                let (geometry, features) = (backing.geometry(), backing.features());
                let disk = Disk { geometry, features, cdrom: false, removable: false };
                let warning = backing.weakness();
                // The toolstack is told last. What may turn out to be another disk fails still.
                if self.vbd.promise().is_none() && std::mem::take(&mut self.medium.has_failed) {
                    self.note_error("");
                }
                self.warn(warning)?;
                match self.vbd.insert_as(disk, identity) {
                    Err(xen_blkback::Error::Promise(broken)) => {
                        self.medium_refused(xen_blkback::Error::Promise(broken).to_string());
                        return self.advance_medium(now);
                    }
                    result => result?,
                }
                let backing = backing.clone();
                if std::mem::take(&mut self.medium.has_failed) {
                    self.note_error("");
                }
                self.medium.state = State::Inserted(backing);
                self.medium.patience = FIRST_RETRY;
            }
            State::Failed => {
                if let Some(reason) = self.medium.untold.take() {
                    self.tell_toolstack(&reason)?;
                }
                let at = now.saturating_add(self.medium.patience);
                self.medium.state = State::Waiting(at);
                self.medium.patience = (2 * self.medium.patience).min(LAST_RETRY);
            }
            State::Waiting(at) if *at <= now => self.open_medium(),
            _ => {}
        }
        Ok(())
    }

    /// A disk that is new is awaited by whoever makes it: `pvblkd attach` reads the error node, libxl
    /// what its script says, which is ours and waits for this.
    fn tell_toolstack(&self, reason: &str) -> Result<(), xen_blkback::Error> {
        let path = self.path();
        xenbus::report_error(&self.store, path, EIO, reason);
        if self.has_our_script && !self.medium.is_old {
            self.store.transaction(|nodes| {
                if nodes.exists(&format!("{path}/state"))? {
                    let reason = xenbus::shorten(reason);
                    nodes.write(&format!("{path}/hotplug-error"), reason)?;
                    nodes.write(&format!("{path}/hotplug-status"), "error")?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Tells everybody what there is to be said against the medium.
    fn warn(&self, warning: Option<String>) -> Result<(), xen_blkback::Error> {
        if let Some(words) = &warning {
            log::warn!("{}: {words}", self.path());
            if self.name.class == toolstack::CLASS {
                let node = |name: &str| format!("{}/{name}", self.path());
                self.store.transaction(|nodes| match nodes.exists(&node("state"))? {
                    true => nodes.write(&node(toolstack::WARNING), words),
                    false => Ok(()),
                })?;
            }
        }
        self.status.update(|condition| condition.warning = warning.unwrap_or_default());
        Ok(())
    }

    /// A worker has seen the medium fail.
    pub(super) fn note_medium_failure(&mut self) {
        if std::mem::replace(&mut self.complained, true) {
            return;
        }
        let Some(backing) = self.medium.backing() else { return };
        log::error!(
            "{}: {} fails, and so do requests of the guest: {}. This is not said again before the \
             disk is connected again; `pvblkd list` counts",
            self.path(),
            backing.source(),
            backing.remedy()
        );
    }
}
