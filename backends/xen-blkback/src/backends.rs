//! All devices that this domain is to serve.
//!
//! The toolstack makes a folder for each guest, and in it one for each of its devices:
//! `/local/domain/0/backend/vbd/3/51712`. One watch sees them all come and go.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pvblk_xen::platform::{Clock, DomainId, StoreTransport};
use pvblk_xen::store::{Changed, Error as StoreError, ErrorKind, Nodes, Store, WatchId};
use pvblk_xen::xenbus::{self, State};

use crate::device::{decimal, domain_id, has_frontend, optional_text};
use crate::error::Error;
use crate::fmt::message;

/// A device that this domain is to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The backend's directory: what [`Vbd::open`](crate::Vbd::open) takes.
    pub path: String,
    /// The frontend's domain.
    pub frontend_id: DomainId,
    /// The number that says which disk this is.
    pub virtual_device: u32,
}

/// What [`Backends::advance`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// There is a device to serve.
    Appeared(Address),
    /// A device's directory is gone. Its [`Vbd`](crate::Vbd), if there still is one, notices by
    /// itself: [`Event::Removed`](crate::Event::Removed).
    Disappeared(Address),
}

/// How many devices are served at most. What is beyond that stays in state Initialising, and the
/// toolstack gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Of one guest. Default 256.
    pub per_domain: usize,
    /// In all. Default 4096.
    pub total: usize,
}

impl Default for Quota {
    fn default() -> Self {
        Self { per_domain: 256, total: 4096 }
    }
}

/// Watches a directory of backends.
pub struct Backends<P: StoreTransport + Clock> {
    store: Store<P>,
    root: String,
    quota: Quota,
    watch: WatchId,
    /// The guests whose folders are to be looked at.
    pending: Changed,
    known: BTreeSet<(DomainId, u32)>,
    /// Whether a message said that there are too many.
    told: bool,
    changes: VecDeque<Change>,
}

impl<P: StoreTransport + Clock> Backends<P> {
    /// Watches `root`, which is absolute and need not be there yet: `/local/domain/0/backend/vbd`.
    ///
    /// # Errors
    ///
    /// [`Error::BadDevice`] if that is no absolute path, [`Error::Store`].
    pub fn open(store: &Store<P>, root: &str, quota: Quota) -> Result<Self, Error> {
        if !root.starts_with('/') || root.ends_with('/') {
            let reason = "an absolute path is expected";
            return Err(Error::BadDevice { node: "path", value: root.into(), reason });
        }
        Ok(Self {
            watch: store.watch_children(root)?,
            store: store.clone(),
            root: root.into(),
            quota,
            pending: Changed::Anything,
            known: BTreeSet::new(),
            told: false,
            changes: VecDeque::new(),
        })
    }

    /// The next change, if there is one. Call it when XenStore has events, and then until there is
    /// none.
    ///
    /// # Errors
    ///
    /// [`Error::Store`]; nothing is lost then: it may be called again. (A list of more than about
    /// 800 guests is too long for a message of XenStore.)
    pub fn advance(&mut self) -> Result<Option<Change>, Error> {
        if self.changes.is_empty() {
            self.store.poll()?;
            self.pending.join(self.store.take_changed(self.watch));
            while self.pending != Changed::Nothing {
                let next = self.scan()?;
                self.pending = next;
            }
        }
        Ok(self.changes.pop_front())
    }

    /// Forgets a device whose [`Vbd`](crate::Vbd) is over. A new one in the same place appears then,
    /// even if the old one was never seen to go.
    pub fn forget(&mut self, address: &Address) {
        if self.known.remove(&(address.frontend_id, address.virtual_device)) {
            self.pending.add(&address.frontend_id.0.to_string());
        }
    }

    /// Looks at the folders of the guests that are pending. Says which are to be looked at next.
    fn scan(&mut self) -> Result<Changed, StoreError> {
        let folders = match &self.pending {
            Changed::Children(names) => names.iter().cloned().collect(),
            _ => self.list(&self.root)?,
        };
        let is_whole = self.pending == Changed::Anything;
        let (mut looked_at, mut present) = (BTreeSet::new(), BTreeSet::new());
        for folder in folders {
            let Some(frontend) = domain_id(&folder) else { continue };
            let names = self.list(&format!("{}/{folder}", self.root))?;
            present.extend(names.iter().filter_map(|name| Some((frontend, decimal(name)?))));
            looked_at.insert(frontend);
        }
        let gone = self.known.difference(&present);
        let gone = gone.filter(|device| is_whole || looked_at.contains(&device.0));
        let gone: Vec<_> = gone.copied().collect();
        // There may be room now for devices of other guests.
        let is_freed = self.told && !gone.is_empty() && !is_whole;
        if is_freed {
            // Also if what follows fails.
            self.pending = Changed::Anything;
        }
        for device in gone {
            self.known.remove(&device);
            self.told = false;
            self.changes.push_back(Change::Disappeared(self.address(device)));
        }
        for device in present {
            if !self.known.contains(&device) && self.has_room(device.0) && self.is_there(device)? {
                self.known.insert(device);
                self.changes.push_back(Change::Appeared(self.address(device)));
            }
        }
        Ok(if is_freed { Changed::Anything } else { Changed::Nothing })
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        match self.store.directory(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            result => result,
        }
    }

    fn has_room(&mut self, frontend: DomainId) -> bool {
        let of_domain = self.known.range((frontend, 0)..=(frontend, u32::MAX)).count();
        let room = of_domain < self.quota.per_domain && self.known.len() < self.quota.total;
        if !room && !self.told {
            message!(warn, "{}: too many devices of domain {}", self.root, frontend.0);
            self.told = true;
        }
        room
    }

    /// Whether the toolstack has made the device, and not ended it.
    fn is_there(&self, device: (DomainId, u32)) -> Result<bool, StoreError> {
        let path = self.address(device).path;
        let state = xenbus::read_state(&self.store, &path)?;
        let frontend = optional_text(&self.store, &path, "frontend")?;
        let Some(frontend) = frontend.filter(|_| state != State::Unknown) else { return Ok(false) };
        if state != State::Closed {
            return Ok(true);
        }
        // Closed, and without a frontend: nobody else is going to use it.
        let online = optional_text(&self.store, &path, "online")?;
        Ok(online.is_some_and(|flag| flag != "0") && has_frontend(&self.store, &frontend)?)
    }

    fn address(&self, (frontend_id, virtual_device): (DomainId, u32)) -> Address {
        let path = format!("{}/{}/{virtual_device}", self.root, frontend_id.0);
        Address { path, frontend_id, virtual_device }
    }
}

impl<P: StoreTransport + Clock> Drop for Backends<P> {
    fn drop(&mut self) {
        // If that fails, the watch goes with the connection to xenstored.
        let _ = self.store.unwatch(self.watch);
    }
}
