//! A client of XenStore, over any byte stream to `xenstored`.
//!
//! [`Store`] asks and waits for the answer, one request at a time, on the thread that sets devices
//! up and takes them down. It is generic over the stream ([`StoreTransport`]): the shared page of
//! a guest and `/dev/xen/xenbus` of Linux carry the same messages. Frontends and backends use the
//! same client.
//!
//! What can be done to nodes is in the trait [`Nodes`], which [`Store`] has in common with
//! [`Transaction`]. Paths that do not begin with a slash are relative to the domain's home:
//! `device/vbd/51712` is `/local/domain/N/device/vbd/51712`.
//!
//! Every wait has an end, no stream of bytes makes the client panic, and its memory does not grow
//! with what `xenstored` or other domains send: a watch is a flag.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;
use core::future::poll_fn;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Poll, Waker};
use core::time::Duration;

use embassy_sync::blocking_mutex::Mutex;

pub use error::{Error, ErrorKind, StoreErrno, Violation};
pub use nodes::Nodes;
pub use transaction::{TRANSACTION_ATTEMPTS, Transaction};
pub use watch::{Changed, WatchId};

use link::{Link, Reply};
use watch::Watches;
use wire::{Operation, PAYLOAD_MAX};

use crate::platform::{Clock, StoreTransport};

mod error;
mod link;
mod nodes;
mod transaction;
mod watch;
mod wire;

pub(crate) use wire::{decimal, decimal_u32, is_path};

/// How long a [`Store`] waits for an answer unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of XenStore: a handle, of which each device has a clone.
///
/// One transport carries one client and its clones: two would take each other's replies.
///
/// A store is `Send` if its transport is and has a [lock](StoreTransport::Lock) that is. Threads must
/// take turns all the same: a request of one while another one waits for its reply is refused
/// ([`Error::Busy`]).
pub struct Store<T: StoreTransport> {
    shared: Arc<Shared<T>>,
}

impl<T: StoreTransport> Clone for Store<T> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

/// What all clones have in common.
struct Shared<T: StoreTransport> {
    transport: T,
    /// Never borrowed while the transport waits.
    inner: Mutex<T::Lock, RefCell<Inner>>,
    /// In nanoseconds.
    timeout: AtomicU64,
}

struct Inner {
    link: Link,
    watches: Watches,
    /// Whom to wake when a watch fires, besides the transport's own waking.
    waker: Option<Waker>,
}

/// What came with one look at the transport.
struct Look {
    /// There may be more, so do not sleep.
    more: bool,
    /// A watch has fired.
    pending: bool,
}

impl<T: StoreTransport + Clock> Store<T> {
    /// A client on a stream that nobody has used since it was connected.
    pub fn new(transport: T) -> Self {
        let inner = Inner { link: Link::new(), watches: Watches::default(), waker: None };
        let inner = Mutex::new(RefCell::new(inner));
        let timeout = AtomicU64::new(0);
        let store = Self { shared: Arc::new(Shared { transport, inner, timeout }) };
        store.set_timeout(DEFAULT_TIMEOUT);
        store
    }

    /// Sets how long every request after this one waits for its answer.
    pub fn set_timeout(&self, timeout: Duration) {
        let nanoseconds = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        self.shared.timeout.store(nanoseconds, Ordering::Relaxed);
    }

    /// Begins to watch a node and all nodes below it.
    ///
    /// `xenstored` fires a new watch once straight away. It may also fire one for no reason.
    ///
    /// # Errors
    ///
    /// [`Error::BadPath`], [`Error::TooLong`], [`Error::Refused`] (a quota of watches, for
    /// example), [`Error::TimedOut`], [`Error::Busy`], and those of the connection
    /// ([`Error::Broken`], [`Error::Protocol`]).
    pub fn watch(&self, path: &str) -> Result<WatchId, Error> {
        self.begin_watch(path, false)
    }

    /// As [`watch`](Self::watch), for a folder of many things: [`take_changed`](Self::take_changed) says
    /// below which of its children something has changed.
    ///
    /// # Errors
    ///
    /// Those of [`watch`](Self::watch).
    pub fn watch_children(&self, path: &str) -> Result<WatchId, Error> {
        self.begin_watch(path, true)
    }

    fn begin_watch(&self, path: &str, names: bool) -> Result<WatchId, Error> {
        check_path(path)?;
        // The first event may arrive before the reply, so the flag must be there first.
        let watch = self.with(|inner| inner.watches.insert(path, names))?;
        let result = self.send_watch(watch, path);
        if result.is_err() {
            self.with(|inner| inner.watches.remove(watch))?;
        }
        result.map(|()| watch)
    }

    /// Ends a watch. It does not fire any more, even if `xenstored` does not confirm that.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchWatch`] if it has been ended before; those of [`watch`](Self::watch).
    pub fn unwatch(&self, watch: WatchId) -> Result<(), Error> {
        let path = self.with(|inner| inner.watches.remove(watch))?.ok_or(Error::NoSuchWatch)?;
        self.name_watch(Operation::Unwatch, watch, &path)
    }

    /// Whether the watch has fired since the last `take`; clears that.
    ///
    /// This does not look for new events: [`poll`](Self::poll) and every request do. It is `false`
    /// for a watch that has been ended.
    pub fn take(&self, watch: WatchId) -> bool {
        self.with(|inner| inner.watches.take(watch)).unwrap_or(false)
    }

    /// As [`take`](Self::take), with what has changed since the last time.
    pub fn take_changed(&self, watch: WatchId) -> Changed {
        self.with(|inner| inner.watches.take_changed(watch)).unwrap_or_default()
    }

    /// Takes in the events that have arrived, without waiting. `true` if any watch has fired and
    /// was not [taken](Self::take) yet.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`], [`Error::Protocol`], [`Error::Busy`].
    pub fn poll(&self) -> Result<bool, Error> {
        Ok(self.look()?.pending)
    }

    /// Sleeps until any watch has fired (`true`), or until `deadline` of [`Clock::now`] (`false`).
    ///
    /// It takes no watch: a caller that leaves one untaken never sleeps again. See
    /// [`wait_for`](Self::wait_for) to wait for one watch among many.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`], [`Error::Protocol`], [`Error::Busy`].
    pub fn wait(&self, deadline: Option<u64>) -> Result<bool, Error> {
        self.wait_until(deadline, |_, pending| pending)
    }

    /// Sleeps until `watch` has fired and takes it (`true`), or until `deadline` of [`Clock::now`]
    /// (`false`). Other watches that fire meanwhile stay flagged.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchWatch`], [`Error::Broken`], [`Error::Protocol`], [`Error::Busy`].
    pub fn wait_for(&self, watch: WatchId, deadline: Option<u64>) -> Result<bool, Error> {
        if !self.with(|inner| inner.watches.contains(watch))? {
            return Err(Error::NoSuchWatch);
        }
        self.wait_until(deadline, |store, _| store.take(watch))
    }

    /// Ready once any watch has fired that was not [taken](Self::take) yet. Otherwise `waker` is
    /// woken when there may be something to take in.
    ///
    /// A store has one waker, the last one: one task polls, and tells the devices.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`], [`Error::Protocol`], [`Error::Busy`].
    pub fn poll_event(&self, waker: &Waker) -> Poll<Result<(), Error>> {
        if self.look()?.pending {
            return Poll::Ready(Ok(()));
        }
        self.shared.transport.set_store_waker(waker);
        drop(self.with(|inner| inner.waker.replace(waker.clone()))?);
        // What arrived before the waker was set woke nobody.
        let look = self.look()?;
        if look.pending {
            return Poll::Ready(Ok(()));
        }
        if look.more {
            waker.wake_by_ref();
        }
        Poll::Pending
    }

    /// Ready once `watch` has fired, and takes it. Otherwise `waker` is woken when there may be
    /// something to take in. As [`poll_event`](Self::poll_event), but events of other watches, which
    /// stay flagged, are no reason to look again and again.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchWatch`], [`Error::Broken`], [`Error::Protocol`], [`Error::Busy`].
    pub fn poll_for(&self, watch: WatchId, waker: &Waker) -> Poll<Result<(), Error>> {
        // Or a flag that nobody takes would wake it in every look below.
        let (old, exists) =
            self.with(|inner| (inner.waker.take(), inner.watches.contains(watch)))?;
        drop(old);
        if !exists {
            return Poll::Ready(Err(Error::NoSuchWatch));
        }
        self.look()?;
        if self.take(watch) {
            return Poll::Ready(Ok(()));
        }
        self.shared.transport.set_store_waker(waker);
        // What arrived before the waker was set woke nobody.
        let look = self.look()?;
        if self.take(watch) {
            return Poll::Ready(Ok(()));
        }
        drop(self.with(|inner| inner.waker.replace(waker.clone()))?);
        if look.more {
            waker.wake_by_ref();
        }
        Poll::Pending
    }

    /// Waits until any watch has fired that was not [taken](Self::take) yet.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`], [`Error::Protocol`], [`Error::Busy`].
    pub async fn event(&self) -> Result<(), Error> {
        poll_fn(|context| self.poll_event(context.waker())).await
    }

    /// Begins anew on a connection that was made anew: after a migration, or to recover from
    /// [`Error::Protocol`]. Sets all watches again, and flags them, since nodes may have changed.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while a request is under way, and those of [`watch`](Self::watch); call it
    /// again then.
    pub fn resume(&self) -> Result<(), Error> {
        let watches = self.with(|inner| {
            if inner.link.is_awaiting() {
                return Err(Error::Busy);
            }
            inner.link.reset();
            Ok(inner.watches.list())
        })??;
        for (watch, path) in watches {
            self.send_watch(watch, &path)?;
            self.with(|inner| inner.watches.fire(watch))?;
        }
        Ok(())
    }

    fn send_watch(&self, watch: WatchId, path: &str) -> Result<(), Error> {
        match self.name_watch(Operation::Watch, watch, path) {
            // An earlier client of this domain, a boot loader perhaps, left just this watch behind.
            // It will do, but it does not fire by itself now.
            Err(error) if error.errno() == Some(StoreErrno::Exists) => {
                self.with(|inner| inner.watches.fire(watch))
            }
            result => result,
        }
    }

    /// A request that names a watch by its path and its token.
    fn name_watch(&self, operation: Operation, watch: WatchId, path: &str) -> Result<(), Error> {
        let token = watch.token();
        self.request(operation, 0, path, &[path.as_bytes(), &[0], token.as_bytes(), &[0]])?;
        Ok(())
    }

    /// Sends a request and waits for its reply. `path` is for the error.
    fn request(
        &self,
        operation: Operation,
        transaction: u32,
        path: &str,
        payload: &[&[u8]],
    ) -> Result<Vec<u8>, Error> {
        let bytes = payload.iter().map(|part| part.len()).sum();
        if bytes > PAYLOAD_MAX {
            return Err(Error::TooLong { bytes });
        }
        let timeout = self.shared.timeout.load(Ordering::Relaxed);
        let deadline = self.shared.transport.now().saturating_add(timeout);

        // The rest of a request that timed out may have to be sent first.
        self.until(deadline, |inner| {
            if inner.link.is_awaiting() {
                return Some(Err(Error::Busy));
            }
            inner.link.begin(operation, transaction, payload).then_some(Ok(()))
        })??;

        let reply = self.until(deadline, |inner| inner.link.take_reply());
        if reply.is_err() {
            self.with(|inner| inner.link.abandon())?;
        }
        let reply: Reply = reply?;
        reply.map_err(|errno| Error::Refused { path: path.into(), errno })
    }

    /// Looks and sleeps by turns until `ready` says so, at most until `deadline`.
    fn until<R>(
        &self,
        deadline: u64,
        mut ready: impl FnMut(&mut Inner) -> Option<R>,
    ) -> Result<R, Error> {
        loop {
            let look = self.look()?;
            if let Some(result) = self.with(&mut ready)? {
                return Ok(result);
            }
            if self.shared.transport.now() >= deadline {
                return Err(Error::TimedOut);
            }
            if !look.more {
                self.shared.transport.wait_store(Some(deadline));
            }
        }
    }

    fn wait_until(
        &self,
        deadline: Option<u64>,
        fired: impl Fn(&Self, bool) -> bool,
    ) -> Result<bool, Error> {
        loop {
            let look = self.look()?;
            if fired(self, look.pending) {
                return Ok(true);
            }
            if deadline.is_some_and(|deadline| self.shared.transport.now() >= deadline) {
                return Ok(false);
            }
            if !look.more {
                self.shared.transport.wait_store(deadline);
            }
        }
    }

    /// Moves the bytes that can be moved now.
    fn look(&self) -> Result<Look, Error> {
        let (more, pending, waker) = self.with(|inner| {
            let more = inner.link.advance(&self.shared.transport, &mut inner.watches);
            let pending = inner.watches.any_pending();
            let woken = pending || more.is_err();
            (more, pending, inner.waker.take_if(|_| woken))
        })?;
        // Not inside: a waker may be anybody's code, and use this store.
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(Look { more: more?, pending })
    }

    fn with<R>(&self, work: impl FnOnce(&mut Inner) -> R) -> Result<R, Error> {
        self.shared.inner.lock(|inner| match inner.try_borrow_mut() {
            Ok(mut inner) => Ok(work(&mut inner)),
            Err(_) => Err(Error::Busy),
        })
    }
}

impl<T: StoreTransport + Clock> nodes::Exchange for Store<T> {
    fn exchange(&self, operation: Operation, path: &str, value: &[u8]) -> Result<Vec<u8>, Error> {
        self.exchange_in(0, operation, path, value)
    }
}

impl<T: StoreTransport + Clock> Store<T> {
    /// A request about one node, in a transaction or (0) in none.
    fn exchange_in(
        &self,
        transaction: u32,
        operation: Operation,
        path: &str,
        value: &[u8],
    ) -> Result<Vec<u8>, Error> {
        check_path(path)?;
        self.request(operation, transaction, path, &[path.as_bytes(), &[0], value])
    }
}

impl<T: StoreTransport> fmt::Debug for Store<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Store").finish_non_exhaustive()
    }
}

fn check_path(path: &str) -> Result<(), Error> {
    if wire::is_path(path) { Ok(()) } else { Err(Error::BadPath { path: path.into() }) }
}
