//! A small `xenstored`: the tree, transactions, watches, and the wire.

mod connection;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::Weak;

use pvblk_xen::platform::{DomainId, StoreBroken};

use crate::faults::FaultState;
use crate::host::Inner;
use connection::{Connection, Kind, Message};
use tree::Tree;

/// Why XenStore refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// `ENOENT`
    #[error("ENOENT")]
    Missing,
    /// `EACCES`
    #[error("EACCES")]
    Forbidden,
    /// `EINVAL`
    #[error("EINVAL")]
    Invalid,
    /// `EEXIST`
    #[error("EEXIST")]
    Exists,
    /// `EAGAIN`
    #[error("EAGAIN")]
    Conflict,
    /// `E2BIG`
    #[error("E2BIG")]
    TooBig,
    /// `ENOSYS`
    #[error("ENOSYS")]
    Unknown,
    /// `EQUOTA`, too many transactions at once
    #[error("EQUOTA")]
    Quota,
}

/// The most transactions that one client may have open.
const TRANSACTIONS: usize = 10;

struct Watch {
    owner: DomainId,
    /// Absolute.
    path: String,
    /// How much of an absolute path the client does not want to see: it gave a relative one.
    hidden: usize,
    token: Vec<u8>,
}

struct Transaction {
    tree: Tree,
    started: u64,
    touched: BTreeSet<String>,
    changes: Vec<Change>,
}

enum Change {
    Write(String, Vec<u8>),
    Make(String),
    Remove(String),
}

pub(crate) struct Store {
    tree: Tree,
    /// When each path was changed last, counted in changes.
    changed: BTreeMap<String, u64>,
    changes: u64,
    watches: Vec<Watch>,
    host_watches: BTreeMap<u64, (String, VecDeque<String>)>,
    host_news: bool,
    next_id: u64,
    connections: BTreeMap<DomainId, Connection>,
    transactions: BTreeMap<(DomainId, u32), Transaction>,
}

/// A watch of a script. It ends when it is dropped.
pub struct StoreWatch {
    pub(crate) id: u64,
    pub(crate) host: Weak<Inner>,
}

impl StoreWatch {
    /// The path of the oldest change not yet seen; the watched path itself at first.
    pub fn next_change(&self) -> Option<String> {
        self.host.upgrade()?.with(|state| state.store.host_watches.get_mut(&self.id)?.1.pop_front())
    }

    /// Forgets all changes not yet seen, and says whether there were any.
    pub fn take_changes(&self) -> bool {
        let mut any = false;
        while self.next_change().is_some() {
            any = true;
        }
        any
    }
}

impl Drop for StoreWatch {
    fn drop(&mut self) {
        if let Some(host) = self.host.upgrade() {
            host.with(|state| state.store.host_watches.remove(&self.id));
        }
    }
}

/// What a look at a client's connection came to.
#[derive(Clone, Copy, Default)]
pub(crate) struct Served {
    /// Anything was done.
    pub(crate) moved: bool,
    /// There is room for the client to send more, which it waited for.
    pub(crate) room: bool,
    /// A request was answered.
    pub(crate) answered: bool,
}

fn home(id: DomainId) -> String {
    format!("/local/domain/{}", id.0)
}

fn is_below(path: &str, top: &str) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Store {
    pub(crate) fn new() -> Self {
        Self {
            tree: Tree::new(),
            changed: BTreeMap::new(),
            changes: 0,
            watches: Vec::new(),
            host_watches: BTreeMap::new(),
            host_news: false,
            next_id: 1,
            connections: BTreeMap::new(),
            transactions: BTreeMap::new(),
        }
    }

    pub(crate) fn introduce(&mut self, id: DomainId) {
        self.connections.insert(id, Connection::new());
        self.write(&home(id), b"");
        self.fire("@introduceDomain");
    }

    /// Ends the connection of a domain that died.
    pub(crate) fn release(&mut self, id: DomainId) {
        self.reconnect(id);
        self.connections.remove(&id);
        self.fire("@releaseDomain");
    }

    /// A new connection for a domain that was migrated, or whose program was killed.
    pub(crate) fn reconnect(&mut self, id: DomainId) {
        self.connections.insert(id, Connection::new());
        self.watches.retain(|watch| watch.owner != id);
        self.transactions.retain(|(owner, _), _| *owner != id);
    }

    // What the toolstack does, without the wire.

    pub(crate) fn read(&self, path: &str) -> Option<&[u8]> {
        self.tree.read(path)
    }

    pub(crate) fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        self.tree.children(path)
    }

    pub(crate) fn write(&mut self, path: &str, value: &[u8]) {
        assert!(tree::is_valid(path), "a bad XenStore path: {path:?}");
        let made = self.tree.write(path, value);
        self.note(path, made);
    }

    pub(crate) fn remove_and_fire(&mut self, path: &str) {
        let targets = self.removal_targets(path);
        if self.tree.remove(path) {
            self.note(path, vec![path.to_string()]);
            self.fire_targets(targets);
        }
    }

    pub(crate) fn watch_from_host(&mut self, path: &str) -> u64 {
        self.next_id += 1;
        let first = VecDeque::from([path.to_string()]);
        self.host_watches.insert(self.next_id, (path.to_string(), first));
        self.next_id
    }

    /// Whether a script's watch fired since the last call.
    pub(crate) fn take_host_news(&mut self) -> bool {
        std::mem::take(&mut self.host_news)
    }

    /// Records that a path changed, and its parents' lists of children where nodes came or went.
    fn note(&mut self, path: &str, made: Vec<String>) {
        self.changes += 1;
        self.changed.insert(path.to_string(), self.changes);
        for made in made {
            self.changed.insert(tree::parent(&made).to_string(), self.changes);
            self.changed.insert(made, self.changes);
        }
    }

    // Watches.

    /// Fires every watch on a path or above it.
    pub(crate) fn fire(&mut self, path: &str) {
        let targets = self.targets(path);
        self.fire_targets(targets);
    }

    /// The watches that a change of `path` fires: index and path shown.
    fn targets(&self, path: &str) -> Vec<(usize, String)> {
        let watches = self.watches.iter().enumerate();
        let mut targets: Vec<_> = watches
            .filter(|(_, watch)| is_below(path, &watch.path) && self.may_read(watch.owner, path))
            .map(|(index, _)| (index, path.to_string()))
            .collect();
        targets.push((usize::MAX, path.to_string()));
        targets
    }

    /// As [`targets`](Self::targets), for a removal: watches below the path fire as well.
    fn removal_targets(&self, path: &str) -> Vec<(usize, String)> {
        let mut targets = self.targets(path);
        for (index, watch) in self.watches.iter().enumerate() {
            if watch.path != path
                && is_below(&watch.path, path)
                && self.tree.read(&watch.path).is_some()
                && self.may_read(watch.owner, &watch.path)
            {
                targets.push((index, watch.path.clone()));
            }
        }
        targets
    }

    fn fire_targets(&mut self, targets: Vec<(usize, String)>) {
        for (index, path) in targets {
            if let Some(watch) = self.watches.get(index) {
                let shown = &path[watch.hidden.min(path.len())..];
                let message = Message::event(shown, &watch.token);
                if let Some(connection) = self.connections.get_mut(&watch.owner) {
                    connection.push(message);
                }
            } else {
                for (top, queue) in self.host_watches.values_mut() {
                    if is_below(&path, top) || is_below(top, &path) {
                        queue.push_back(path.clone());
                        self.host_news = true;
                    }
                }
            }
        }
    }

    // Permissions: a domain owns its home. It may read where it is the peer of a device.

    fn may_read(&self, id: DomainId, path: &str) -> bool {
        if id.0 == 0 || is_below(path, &home(id)) || path.starts_with('@') {
            return true;
        }
        let mut parts = path.split('/').skip(1);
        let (Some("local"), Some("domain"), Some(_)) = (parts.next(), parts.next(), parts.next())
        else {
            return false;
        };
        let own = id.0.to_string();
        match (parts.next(), parts.next(), parts.next()) {
            (Some("backend"), Some(_), Some(frontend)) => frontend == own,
            (Some("device"), Some(_), Some(_)) => {
                // The frontend's directory: its fifth slash-separated part is the last to keep.
                let end = path.match_indices('/').nth(6).map_or(path.len(), |(index, _)| index);
                let backend = self.tree.read(&format!("{}/backend-id", &path[..end]));
                backend == Some(own.as_bytes())
            }
            _ => false,
        }
    }

    fn may_write(&self, id: DomainId, path: &str) -> bool {
        id.0 == 0 || is_below(path, &home(id))
    }

    // The wire.

    pub(crate) fn send(&mut self, id: DomainId, bytes: &[u8]) -> Result<usize, StoreBroken> {
        self.connection(id)?.send(bytes)
    }

    pub(crate) fn receive(&mut self, id: DomainId, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        self.connection(id)?.receive(bytes)
    }

    fn connection(&mut self, id: DomainId) -> Result<&mut Connection, StoreBroken> {
        self.connections.get_mut(&id).ok_or(StoreBroken)
    }

    /// Whether there is nothing for the client to receive.
    pub(crate) fn is_empty(&self, id: DomainId) -> bool {
        self.connections.get(&id).is_none_or(Connection::is_empty)
    }

    pub(crate) fn has_request(&self, id: DomainId) -> bool {
        self.connections.get(&id).is_some_and(Connection::has_request)
    }

    /// Moves answers and events to the client's ring.
    pub(crate) fn deliver(&mut self, id: DomainId, faults: &mut FaultState) -> bool {
        self.connections.get_mut(&id).is_some_and(|connection| connection.deliver(faults))
    }

    /// Serves at most one request.
    pub(crate) fn serve(&mut self, id: DomainId, faults: &mut FaultState) -> Served {
        let Some(connection) = self.connections.get_mut(&id) else { return Served::default() };
        let (moved, room) = connection.collect(faults);
        let Some(request) = connection.next_request() else {
            return Served { moved, room, answered: false };
        };
        let result = self.answer(id, &request, faults);
        let answer = match result {
            Ok(payload) if payload.len() > connection::PAYLOAD_MAX => {
                request.error(StoreError::TooBig)
            }
            Ok(payload) => request.answer(payload),
            Err(error) => request.error(error),
        };
        let watch = request.kind == Kind::Watch && answer.kind == Kind::Watch;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.push(answer);
        }
        if watch && let Some(watch) = self.watches.last() {
            // A watch fires once at its registration, after the answer.
            let shown = &watch.path[watch.hidden.min(watch.path.len())..];
            let event = Message::event(shown, &watch.token);
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.push(event);
            }
        }
        Served { moved: true, room, answered: true }
    }

    /// The names of a node's children, each with a NUL byte.
    fn names(&mut self, id: DomainId, request: &Message) -> Result<Vec<u8>, StoreError> {
        let path = self.path(id, request.text(0)?)?;
        self.check_read(id, &path)?;
        let names = self.view(id, request.transaction, &path).children(&path)?;
        Ok(names.iter().flat_map(|name| name.bytes().chain([0])).collect())
    }

    fn answer(
        &mut self,
        id: DomainId,
        request: &Message,
        faults: &mut FaultState,
    ) -> Result<Vec<u8>, StoreError> {
        let ok = || Ok(b"OK\0".to_vec());
        let transaction = request.transaction;
        if transaction != 0 && !self.transactions.contains_key(&(id, transaction)) {
            return Err(StoreError::Missing);
        }
        match request.kind {
            Kind::Directory => self.names(id, request),
            Kind::DirectoryPart => {
                let offset: usize = request.text(1)?.parse().map_err(|_| StoreError::Invalid)?;
                let names = self.names(id, request)?;
                let rest = names.get(offset..).unwrap_or_default();
                let mut part = format!("{}\0", self.changes).into_bytes();
                // Whole names, and an empty one after the last.
                let room = connection::PAYLOAD_MAX - part.len() - 1;
                let end = match rest.len() {
                    length if length <= room => length,
                    _ => rest[..room].iter().rposition(|&byte| byte == 0).map_or(0, |at| at + 1),
                };
                part.extend(&rest[..end]);
                if end == rest.len() {
                    part.push(0);
                }
                Ok(part)
            }
            Kind::Read => {
                let path = self.path(id, request.text(0)?)?;
                self.check_read(id, &path)?;
                let value = self.view(id, transaction, &path).read(&path);
                Ok(value.ok_or(StoreError::Missing)?.to_vec())
            }
            Kind::Write => {
                let (path, value) = request.split_value()?;
                let path = self.path(id, path)?;
                self.change(id, transaction, Change::Write(path, value.to_vec()))?;
                ok()
            }
            Kind::Make => {
                let path = self.path(id, request.text(0)?)?;
                self.change(id, transaction, Change::Make(path))?;
                ok()
            }
            Kind::Remove => {
                let path = self.path(id, request.text(0)?)?;
                self.change(id, transaction, Change::Remove(path))?;
                ok()
            }
            Kind::GetPermissions => {
                let path = self.path(id, request.text(0)?)?;
                self.check_read(id, &path)?;
                self.view(id, transaction, &path).read(&path).ok_or(StoreError::Missing)?;
                Ok(format!("n{}\0", id.0).into_bytes())
            }
            Kind::SetPermissions => {
                let path = self.path(id, request.text(0)?)?;
                if !self.may_write(id, &path) {
                    return Err(StoreError::Forbidden);
                }
                self.view(id, transaction, &path).read(&path).ok_or(StoreError::Missing)?;
                ok()
            }
            Kind::Watch => {
                let (given, token) = (request.text(0)?, request.text(1)?);
                let path = self.path(id, given)?;
                let same = |watch: &Watch| {
                    watch.owner == id && watch.path == path && watch.token == token.as_bytes()
                };
                if self.watches.iter().any(same) {
                    return Err(StoreError::Exists);
                }
                let relative = !given.starts_with(['/', '@']);
                let hidden = if relative { home(id).len() + 1 } else { 0 };
                let token = token.as_bytes().to_vec();
                self.watches.push(Watch { owner: id, path, hidden, token });
                ok()
            }
            Kind::Unwatch => {
                let (path, token) = (self.path(id, request.text(0)?)?, request.text(1)?);
                let index = self.watches.iter().position(|watch| {
                    watch.owner == id && watch.path == path && watch.token == token.as_bytes()
                });
                self.watches.remove(index.ok_or(StoreError::Missing)?);
                ok()
            }
            Kind::ResetWatches => {
                self.watches.retain(|watch| watch.owner != id);
                ok()
            }
            Kind::TransactionStart => {
                if transaction != 0 {
                    return Err(StoreError::Invalid);
                }
                if self.transactions.keys().filter(|(owner, _)| *owner == id).count()
                    >= TRANSACTIONS
                {
                    return Err(StoreError::Quota);
                }
                self.next_id += 1;
                let number = self.next_id as u32;
                let transaction = Transaction {
                    tree: self.tree.clone(),
                    started: self.changes,
                    touched: BTreeSet::new(),
                    changes: Vec::new(),
                };
                self.transactions.insert((id, number), transaction);
                Ok(format!("{number}\0").into_bytes())
            }
            Kind::TransactionEnd => {
                let commit = request.text(0)? == "T";
                let transaction =
                    self.transactions.remove(&(id, transaction)).ok_or(StoreError::Missing)?;
                if commit {
                    self.commit(transaction, faults)?;
                }
                ok()
            }
            Kind::GetDomainPath => {
                let number: u16 = request.text(0)?.parse().map_err(|_| StoreError::Invalid)?;
                Ok(format!("/local/domain/{number}\0").into_bytes())
            }
            Kind::IsDomainIntroduced => {
                let number: u16 = request.text(0)?.parse().map_err(|_| StoreError::Invalid)?;
                let known = self.connections.contains_key(&DomainId(number));
                Ok(if known { b"T\0".to_vec() } else { b"F\0".to_vec() })
            }
            Kind::Event | Kind::Error | Kind::Other(_) => Err(StoreError::Unknown),
        }
    }

    /// The absolute form of a client's path.
    fn path(&self, id: DomainId, path: &str) -> Result<String, StoreError> {
        if path.starts_with('@') {
            return Ok(path.to_string());
        }
        let absolute = match path {
            "/" => String::new(),
            _ if path.starts_with('/') => path.to_string(),
            _ => format!("{}/{path}", home(id)),
        };
        if tree::is_valid(&absolute) { Ok(absolute) } else { Err(StoreError::Invalid) }
    }

    fn check_read(&self, id: DomainId, path: &str) -> Result<(), StoreError> {
        if self.may_read(id, path) { Ok(()) } else { Err(StoreError::Forbidden) }
    }

    /// The tree that a request sees. Inside a transaction, what was looked at is remembered.
    fn view(&mut self, id: DomainId, transaction: u32, path: &str) -> &Tree {
        match self.transactions.get_mut(&(id, transaction)) {
            Some(transaction) => {
                transaction.touched.insert(path.to_string());
                &transaction.tree
            }
            None => &self.tree,
        }
    }

    fn change(&mut self, id: DomainId, number: u32, change: Change) -> Result<(), StoreError> {
        let (Change::Write(path, _) | Change::Make(path) | Change::Remove(path)) = &change;
        if !self.may_write(id, path) {
            return Err(StoreError::Forbidden);
        }
        let Some(transaction) = self.transactions.get_mut(&(id, number)) else {
            return self.apply(change);
        };
        transaction.touched.insert(path.clone());
        match &change {
            Change::Write(path, value) => {
                transaction.tree.write(path, value);
            }
            Change::Make(path) => {
                if transaction.tree.read(path).is_none() {
                    transaction.tree.write(path, b"");
                }
            }
            Change::Remove(path) => {
                if transaction.tree.read(tree::parent(path)).is_none() {
                    return Err(StoreError::Missing);
                }
                transaction.tree.remove(path);
            }
        }
        transaction.changes.push(change);
        Ok(())
    }

    fn apply(&mut self, change: Change) -> Result<(), StoreError> {
        match change {
            Change::Write(path, value) => {
                self.write(&path, &value);
                self.fire(&path);
            }
            Change::Make(path) => {
                if self.tree.read(&path).is_none() {
                    self.write(&path, b"");
                    self.fire(&path);
                }
            }
            Change::Remove(path) => {
                if self.tree.read(tree::parent(&path)).is_none() {
                    return Err(StoreError::Missing);
                }
                self.remove_and_fire(&path);
            }
        }
        Ok(())
    }

    fn commit(
        &mut self,
        transaction: Transaction,
        faults: &mut FaultState,
    ) -> Result<(), StoreError> {
        let conflict = transaction
            .touched
            .iter()
            .any(|path| self.changed.get(path).is_some_and(|at| *at > transaction.started));
        if conflict || faults.conflict() {
            return Err(StoreError::Conflict);
        }
        for change in transaction.changes {
            // Each was possible on the transaction's tree, and nothing that it touched changed.
            let _ = self.apply(change);
        }
        Ok(())
    }

    pub(crate) fn dump(&self) -> String {
        self.tree.dump()
    }

    pub(crate) fn dump_connection(&self, id: DomainId, text: &mut String) {
        if let Some(connection) = self.connections.get(&id) {
            connection.dump(text);
        }
        for watch in self.watches.iter().filter(|watch| watch.owner == id) {
            let token = String::from_utf8_lossy(&watch.token);
            let _ = writeln!(text, "  watch {} (token {token})", watch.path);
        }
    }
}
