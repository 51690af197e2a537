//! What a toolstack does, for disks of our own class: gives a guest a disk, and takes it away.
//!
//! libxl has no way to say that a disk is served by somebody else in dom0 while xen-blkback is
//! loaded. But a frontend follows whatever its node `backend` says. So the backend's directory is
//! `/local/domain/0/backend/pvblk/<guest>/<device>`, where no kernel looks for disks, and the
//! frontend's is the one that any disk has. libxl does not know the disk: it is not in `xl
//! block-list`, and does not go with the guest to another host.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pvblk_xen::platform::{Clock, DomainId, StoreTransport};
use pvblk_xen::store::{ErrorKind, Nodes, Store};
use pvblk_xen::xenbus::{self, State};

use crate::options::DiskOptions;
use crate::source::Source;
use crate::vdev::VirtualDevice;

/// The folder below `backend` of disks that we gave to their guests.
pub const CLASS: &str = "pvblk";

/// The node with the settings of a disk.
pub const OPTIONS: &str = "pvblk-options";

/// The node with what the daemon warns of.
pub const WARNING: &str = "pvblk-warning";

/// A disk of a guest, for whoever gives and takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The domain that serves it: this one.
    pub backend: DomainId,
    /// The guest.
    pub frontend: DomainId,
    /// Which of its disks.
    pub device: VirtualDevice,
}

/// A disk to be given to a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Where.
    pub place: Place,
    /// What it is served from.
    pub source: Source,
    /// How.
    pub options: DiskOptions,
}

impl Place {
    /// The backend's directory.
    pub fn backend_path(&self) -> String {
        let (back, front, device) = (self.backend.0, self.frontend.0, self.device.0);
        format!("/local/domain/{back}/backend/{CLASS}/{front}/{device}")
    }

    /// The frontend's directory.
    pub fn frontend_path(&self) -> String {
        format!("/local/domain/{}/device/vbd/{}", self.frontend.0, self.device.0)
    }

    /// Where the backend says what went wrong.
    fn error_path(&self) -> String {
        xenbus::error_path(&self.backend_path())
    }
}

/// The number of this domain.
///
/// # Errors
///
/// If XenStore does not say.
pub fn own_domain(nodes: &impl Nodes) -> Result<DomainId> {
    match nodes.read_u32("domid") {
        Ok(Some(number)) => {
            u16::try_from(number).map(DomainId).ok().context("this domain has an impossible number")
        }
        // dom0 may have no node of its own.
        Ok(None) => Ok(DomainId(0)),
        Err(error) => Err(error.into()),
    }
}

/// The domain that somebody means by a name or a number.
///
/// # Errors
///
/// If there is no such domain.
pub fn find_domain(nodes: &impl Nodes, text: &str) -> Result<DomainId> {
    if let Ok(number) = text.parse() {
        if nodes.exists(&format!("/local/domain/{number}"))? {
            return Ok(DomainId(number));
        }
        bail!("there is no domain {number}: see `xl list`");
    }
    for number in nodes.directory("/local/domain")? {
        let name = nodes.read_optional(&format!("/local/domain/{number}/name"));
        if name.is_ok_and(|name| name.as_deref() == Some(text))
            && let Ok(number) = number.parse()
        {
            return Ok(DomainId(number));
        }
    }
    bail!("there is no domain {text:?}: see `xl list`")
}

/// What a domain is called; empty if it has no name.
pub fn domain_name(nodes: &impl Nodes, domain: DomainId) -> String {
    let name = nodes.read_optional(&format!("/local/domain/{}/name", domain.0));
    name.ok().flatten().unwrap_or_default()
}

/// Gives a guest a disk: writes the nodes of both ends, at once. The daemon sees them.
///
/// # Errors
///
/// If the guest has a disk of that name already, or XenStore does not do it.
pub fn attach<T: StoreTransport + Clock>(store: &Store<&T>, disk: &NewDisk) -> Result<()> {
    let place = &disk.place;
    let (back, front) = (place.backend_path(), place.frontend_path());
    let taken = store.transaction(|nodes| {
        if !nodes.exists(&format!("/local/domain/{}", place.frontend.0))? {
            return Ok(Some("there is no such guest"));
        }
        if nodes.exists(&format!("{front}/backend"))? {
            return Ok(Some("the guest has a disk of that name already"));
        }
        if nodes.exists(&format!("{back}/state"))? {
            return Ok(Some("a disk of that name is still being taken away"));
        }
        write_backend(nodes, disk)?;
        write_frontend(nodes, disk)?;
        Ok(None)
    })?;
    match taken {
        Some(reason) => bail!("domain {}, {}: {reason}", place.frontend.0, place.device),
        None => Ok(()),
    }
}

fn write_backend(nodes: &impl Nodes, disk: &NewDisk) -> Result<(), pvblk_xen::store::Error> {
    let place = &disk.place;
    let path = place.backend_path();
    let _ = nodes.remove(&place.error_path())?;
    nodes.mkdir(&path)?;
    // The guest may read what its backend says, and no more.
    nodes.set_permissions(&path, place.backend, &[place.frontend])?;
    let read_only = disk.options.read_only == Some(true);
    for (name, value) in [
        ("frontend", &*place.frontend_path()),
        ("frontend-id", &*place.frontend.0.to_string()),
        ("online", "1"),
        ("removable", "0"),
        ("bootable", "0"),
        ("dev", &*place.device.to_string()),
        ("type", "phy"),
        ("mode", if read_only { "r" } else { "w" }),
        ("device-type", "disk"),
        ("params", &*disk.source.to_string()),
        (OPTIONS, &*disk.options.to_node()),
        ("state", "1"),
    ] {
        nodes.write(&format!("{path}/{name}"), value)?;
    }
    Ok(())
}

fn write_frontend(nodes: &impl Nodes, disk: &NewDisk) -> Result<(), pvblk_xen::store::Error> {
    let place = &disk.place;
    let path = place.frontend_path();
    nodes.mkdir(&path)?;
    // The guest's own, which its backend may read.
    nodes.set_permissions(&path, place.frontend, &[place.backend])?;
    for (name, value) in [
        ("backend", &*place.backend_path()),
        ("backend-id", &*place.backend.0.to_string()),
        ("virtual-device", &*place.device.0.to_string()),
        ("device-type", "disk"),
        ("trusted", "1"),
        ("state", "1"),
    ] {
        nodes.write(&format!("{path}/{name}"), value)?;
    }
    Ok(())
}

/// What is waited for of a new disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The daemon has opened it. Whether its guest uses it then is the guest's affair.
    Open,
    /// The guest has it.
    Connected,
}

/// How far a new disk is.
#[derive(Debug)]
enum Progress {
    There,
    Failed(String),
}

/// Waits for a new disk. If that fails, the disk is taken away again. What the daemon warns of, if there
/// is something.
///
/// # Errors
///
/// What the daemon says; who did not come, if nothing happens.
pub fn wait_for<T: StoreTransport + Clock>(
    (store, clock): (&Store<&T>, &T),
    place: &Place,
    wanted: Wanted,
    patience: Duration,
) -> Result<Option<String>> {
    let path = place.backend_path();
    let (mut state, mut front) = (State::Unknown, State::Unknown);
    let progress = wait((store, clock), place, patience, || {
        if let Some(error) = store.read_optional(&place.error_path())? {
            return Ok(Some(Progress::Failed(error)));
        }
        let status = store.read_optional(&format!("{path}/hotplug-status"))?;
        state = xenbus::read_state(store, &path)?;
        front = xenbus::read_state(store, &place.frontend_path())?;
        if state == State::Unknown || front == State::Unknown {
            let words = "the disk is gone: was it detached, or its guest destroyed?";
            return Ok(Some(Progress::Failed(words.into())));
        }
        let is_open = status.as_deref() == Some("connected")
            && matches!(state, State::InitWait | State::Initialised | State::Connected);
        let is_there = match wanted {
            Wanted::Open => is_open,
            Wanted::Connected => (state, front) == (State::Connected, State::Connected),
        };
        Ok(is_there.then_some(Progress::There))
    })?;
    let reason = match progress {
        Some(Progress::There) => return Ok(store.read_optional(&format!("{path}/{WARNING}"))?),
        Some(Progress::Failed(error)) => error,
        None => missing(state, front).into(),
    };
    store.remove(&place.frontend_path())?;
    if xenbus::read_state(store, &path)? == State::Initialising {
        // Nobody has looked at it.
        xenbus::remove_directory(store, &place.backend_path())?;
    } else {
        store.transaction(|nodes| match nodes.exists(&format!("{path}/state"))? {
            true => nodes.write(&format!("{path}/online"), "0"),
            false => Ok(()),
        })?;
    }
    // The number is that of the error on Linux, for programs.
    let text = reason.split_once(' ').filter(|(number, _)| number.parse::<u32>().is_ok());
    bail!("{}", text.map_or(&*reason, |(_, text)| text))
}

/// Who did not come, when the two ends of a disk have got no further than this.
fn missing(back: State, front: State) -> &'static str {
    match (back, front) {
        (State::Initialising, _) => "nobody answers: is `pvblkd serve` running?",
        (_, State::Initialising | State::InitWait) => {
            "the guest has not taken the disk: does it run, and has it a driver for Xen's disks \
             (xen-blkfront)? With --no-wait it may come later"
        }
        (State::InitWait, _) => "pvblkd has not connected the guest in time: see its log",
        (State::Connected, _) => {
            "the guest has not finished to connect: see its kernel's messages. With --no-wait it may \
             take its time"
        }
        _ => "the disk is being closed: see `pvblkd list`, and the guest's kernel's messages",
    }
}

/// Asks for the end of a disk, and waits until both ends have let go. With `force` the guest is not
/// asked: its disk is gone.
///
/// # Errors
///
/// If there is no such disk, or the guest does not let go in time (it may still do so later).
pub fn detach<T: StoreTransport + Clock>(
    (store, clock): (&Store<&T>, &T),
    place: &Place,
    force: bool,
    patience: Duration,
) -> Result<()> {
    let (back, front) = (place.backend_path(), place.frontend_path());
    let found = store.transaction(|nodes| {
        if !nodes.exists(&format!("{back}/state"))? {
            return Ok(false);
        }
        nodes.write(&format!("{back}/online"), "0")?;
        if xenbus::read_state(nodes, &back)? != State::Closed {
            xenbus::write_state(nodes, &back, State::Closing)?;
        }
        if force {
            nodes.remove(&front)?;
        }
        Ok(true)
    })?;
    if !found {
        bail!(
            "domain {} has no disk {} of `pvblkd attach` (for others there is `xl block-detach`)",
            place.frontend.0,
            place.device
        );
    }
    let closed = wait((store, clock), place, patience, || {
        let state = xenbus::read_state(store, &back)?;
        Ok(matches!(state, State::Closed | State::Unknown).then_some(()))
    })?;
    if closed.is_none() {
        bail!(
            "the guest has not let go of its disk: it is in use there. It will go when the guest \
             unmounts it; --force does not ask"
        );
    }
    store.remove(&front)?;
    // The daemon does that, too.
    xenbus::remove_directory(store, &place.backend_path())?;
    Ok(())
}

/// Looks whenever there is news of the place, until there is something or patience is over.
fn wait<T: StoreTransport + Clock, R>(
    (store, clock): (&Store<&T>, &T),
    place: &Place,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<R>, pvblk_xen::store::Error>,
) -> Result<Option<R>> {
    let watches = [
        store.watch(&place.backend_path())?,
        store.watch(&place.frontend_path())?,
        store.watch(&place.error_path())?,
    ];
    let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
    let end = clock.now().saturating_add(patience);
    let result = loop {
        for watch in watches {
            store.take(watch);
        }
        match look() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Ok(None) => {}
            result => break result,
        }
        match store.wait(Some(end)) {
            Ok(true) => {}
            Ok(false) => break Ok(None),
            Err(error) => break Err(error),
        }
    };
    for watch in watches {
        store.unwatch(watch)?;
    }
    Ok(result?)
}
