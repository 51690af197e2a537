//! Several reads and writes that happen at once or not at all.

use alloc::vec::Vec;

use super::Store;
use super::error::{Error, StoreErrno, Violation};
use super::nodes::Exchange;
use super::wire::{self, Operation};
use crate::platform::{Clock, StoreTransport};

/// How often [`Store::transaction`] tries before it gives up.
///
/// Older versions of `xenstored` call any write by anybody a conflict, so a busy host needs more
/// than a few attempts.
pub const TRANSACTION_ATTEMPTS: u32 = 32;

/// A transaction that is open. See [`Store::transaction`].
pub struct Transaction<'s, T: StoreTransport> {
    store: &'s Store<T>,
    number: u32,
}

impl<T: StoreTransport + Clock> Store<T> {
    /// Does several things at once: what `action` does through the [`Transaction`] is seen by
    /// others as one change, or never if it fails.
    ///
    /// `action` runs again, up to [`TRANSACTION_ATTEMPTS`] times in all, if others changed the same
    /// nodes meanwhile.
    ///
    /// # Errors
    ///
    /// What `action` failed with, and then nothing was changed; [`Error::Conflict`];
    /// [`Error::Refused`] (a quota of transactions, for example); [`Error::TimedOut`], and then it
    /// is not known whether anything was changed; [`Error::Busy`], [`Error::Broken`],
    /// [`Error::Protocol`].
    pub fn transaction<R>(
        &self,
        mut action: impl FnMut(&Transaction<'_, T>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        for _ in 0..TRANSACTION_ATTEMPTS {
            let transaction = Transaction { store: self, number: self.start()? };
            let result = match action(&transaction) {
                Ok(result) => result,
                Err(error) => {
                    self.abort(transaction.number);
                    return Err(error);
                }
            };
            match self.request(Operation::TransactionEnd, transaction.number, "", &[b"T\0"]) {
                Ok(_) => return Ok(result),
                Err(error) if error.errno() == Some(StoreErrno::Again) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Conflict { attempts: TRANSACTION_ATTEMPTS })
    }

    fn start(&self) -> Result<u32, Error> {
        let payload = self.request(Operation::TransactionStart, 0, "", &[&[0]])?;
        wire::transaction_number(&payload).ok_or(Violation::MalformedReply.into())
    }

    /// An abort is sent as soon as there is room, and nobody waits for its reply: what the caller
    /// wants to know is why the transaction failed, without another time-out on top.
    fn abort(&self, transaction: u32) {
        // If the connection is broken, the next request says so.
        let _ = self.with(|inner| inner.link.abort(transaction)).and_then(|()| self.look());
    }
}

impl<T: StoreTransport + Clock> Exchange for Transaction<'_, T> {
    fn exchange(&self, operation: Operation, path: &str, value: &[u8]) -> Result<Vec<u8>, Error> {
        self.store.exchange_in(self.number, operation, path, value)
    }
}
