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

use alloc::vec::Vec;
use core::cell::{Cell, RefCell, RefMut};
use core::fmt;
use core::future::poll_fn;
use core::task::{Poll, Waker};
use core::time::Duration;

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

/// A client of XenStore.
///
/// It works on `&self`, so that several devices can share it, but on one thread only. One
/// transport carries one `Store`: two would take each other's replies.
pub struct Store<'t, T> {
    transport: &'t T,
    /// Never borrowed while the transport waits.
    inner: RefCell<Inner>,
    /// In nanoseconds.
    timeout: Cell<u64>,
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

impl<'t, T: StoreTransport + Clock> Store<'t, T> {
    /// A client on a stream that nobody has used since it was connected.
    pub fn new(transport: &'t T) -> Self {
        let inner = Inner { link: Link::new(), watches: Watches::default(), waker: None };
        let store = Self { transport, inner: RefCell::new(inner), timeout: Cell::new(0) };
        store.set_timeout(DEFAULT_TIMEOUT);
        store
    }

    /// Sets how long every request after this one waits for its answer.
    pub fn set_timeout(&self, timeout: Duration) {
        self.timeout.set(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
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
        let watch = self.inner()?.watches.insert(path, names);
        let result = self.send_watch(watch, path);
        if result.is_err() {
            self.inner()?.watches.remove(watch);
        }
        result.map(|()| watch)
    }

    /// Ends a watch. It does not fire any more, even if `xenstored` does not confirm that.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchWatch`] if it has been ended before; those of [`watch`](Self::watch).
    pub fn unwatch(&self, watch: WatchId) -> Result<(), Error> {
        let path = self.inner()?.watches.remove(watch).ok_or(Error::NoSuchWatch)?;
        self.name_watch(Operation::Unwatch, watch, &path)
    }

    /// Whether the watch has fired since the last `take`; clears that.
    ///
    /// This does not look for new events: [`poll`](Self::poll) and every request do. It is `false`
    /// for a watch that has been ended.
    pub fn take(&self, watch: WatchId) -> bool {
        self.inner().is_ok_and(|mut inner| inner.watches.take(watch))
    }

    /// As [`take`](Self::take), with what has changed since the last time.
    pub fn take_changed(&self, watch: WatchId) -> Changed {
        self.inner().map(|mut inner| inner.watches.take_changed(watch)).unwrap_or_default()
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
        if !self.inner()?.watches.contains(watch) {
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
        self.transport.set_store_waker(waker);
        self.inner()?.waker = Some(waker.clone());
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
        {
            let mut inner = self.inner()?;
            // Or a flag that nobody takes would wake it in every look below.
            inner.waker = None;
            if !inner.watches.contains(watch) {
                return Poll::Ready(Err(Error::NoSuchWatch));
            }
        }
        self.look()?;
        if self.take(watch) {
            return Poll::Ready(Ok(()));
        }
        self.transport.set_store_waker(waker);
        // What arrived before the waker was set woke nobody.
        let look = self.look()?;
        if self.take(watch) {
            return Poll::Ready(Ok(()));
        }
        self.inner()?.waker = Some(waker.clone());
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
        let watches = {
            let mut inner = self.inner()?;
            if inner.link.is_awaiting() {
                return Err(Error::Busy);
            }
            inner.link.reset();
            inner.watches.list()
        };
        for (watch, path) in watches {
            self.send_watch(watch, &path)?;
            self.inner()?.watches.fire(watch);
        }
        Ok(())
    }

    fn send_watch(&self, watch: WatchId, path: &str) -> Result<(), Error> {
        match self.name_watch(Operation::Watch, watch, path) {
            // An earlier client of this domain, a boot loader perhaps, left just this watch behind.
            // It will do, but it does not fire by itself now.
            Err(error) if error.errno() == Some(StoreErrno::Exists) => {
                self.inner()?.watches.fire(watch);
                Ok(())
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
        let deadline = self.transport.now().saturating_add(self.timeout.get());

        // The rest of a request that timed out may have to be sent first.
        self.until(deadline, |inner| {
            if inner.link.is_awaiting() {
                return Some(Err(Error::Busy));
            }
            inner.link.begin(operation, transaction, payload).then_some(Ok(()))
        })??;

        let reply = self.until(deadline, |inner| inner.link.take_reply());
        if reply.is_err() {
            self.inner()?.link.abandon();
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
            if let Some(result) = ready(&mut *self.inner()?) {
                return Ok(result);
            }
            if self.transport.now() >= deadline {
                return Err(Error::TimedOut);
            }
            if !look.more {
                self.transport.wait_store(Some(deadline));
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
            if deadline.is_some_and(|deadline| self.transport.now() >= deadline) {
                return Ok(false);
            }
            if !look.more {
                self.transport.wait_store(deadline);
            }
        }
    }

    /// Moves the bytes that can be moved now.
    fn look(&self) -> Result<Look, Error> {
        let mut inner = self.inner()?;
        let Inner { link, watches, waker } = &mut *inner;
        let more = link.advance(self.transport, watches);
        let pending = watches.any_pending();
        let waker = if pending || more.is_err() { waker.take() } else { None };
        // A waker may be anybody's code, and use this store.
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(Look { more: more?, pending })
    }

    fn inner(&self) -> Result<RefMut<'_, Inner>, Error> {
        self.inner.try_borrow_mut().map_err(|_| Error::Busy)
    }
}

impl<T: StoreTransport + Clock> nodes::Exchange for Store<'_, T> {
    fn exchange(&self, operation: Operation, path: &str, value: &[u8]) -> Result<Vec<u8>, Error> {
        self.exchange_in(0, operation, path, value)
    }
}

impl<T: StoreTransport + Clock> Store<'_, T> {
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

impl<T> fmt::Debug for Store<'_, T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Store").finish_non_exhaustive()
    }
}

fn check_path(path: &str) -> Result<(), Error> {
    if wire::is_path(path) { Ok(()) } else { Err(Error::BadPath { path: path.into() }) }
}
