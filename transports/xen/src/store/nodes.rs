//! What can be done to nodes, in a transaction and outside.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::error::{Error, StoreErrno, Violation};
use super::wire::{self, LIST_MAX, Operation, PAYLOAD_MAX};
use crate::platform::DomainId;

/// Asks for one thing about one node. What implements this, gets [`Nodes`].
pub trait Exchange {
    /// Sends the path and what follows it, and gives back the reply's payload.
    fn exchange(&self, operation: Operation, path: &str, value: &[u8]) -> Result<Vec<u8>, Error>;
}

/// Reads and writes nodes: a [`Store`](super::Store) node by node, a
/// [`Transaction`](super::Transaction) all at once.
///
/// The trait cannot be implemented outside this crate.
///
/// # Errors
///
/// Every function may fail with [`Error::BadPath`], [`Error::TooLong`], [`Error::Refused`] (above
/// all: no permission), [`Error::TimedOut`], [`Error::Busy`], or because of the connection
/// ([`Error::Broken`], [`Error::Protocol`]). What each adds to that is said there.
pub trait Nodes: Exchange {
    /// Reads a node's value as it is. `None` if there is no such node.
    ///
    /// # Errors
    ///
    /// Those of [`Nodes`].
    fn read_bytes(&self, path: &str) -> Result<Option<Vec<u8>>, Error> {
        present(self.exchange(Operation::Read, path, &[]))
    }

    /// Reads a node's value, which must be there.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with [`StoreErrno::NotFound`] if there is no such node,
    /// [`Error::BadValue`] if the value is not UTF-8, and those of [`Nodes`].
    fn read(&self, path: &str) -> Result<String, Error> {
        self.read_optional(path)?
            .ok_or_else(|| Error::Refused { path: path.into(), errno: StoreErrno::NotFound })
    }

    /// Reads a node's value. `None` if there is no such node.
    ///
    /// # Errors
    ///
    /// [`Error::BadValue`] if the value is not UTF-8, and those of [`Nodes`].
    fn read_optional(&self, path: &str) -> Result<Option<String>, Error> {
        let Some(bytes) = self.read_bytes(path)? else { return Ok(None) };
        let bad_value = |_| Error::BadValue { path: path.into(), expected: "UTF-8 text" };
        String::from_utf8(bytes).map(Some).map_err(bad_value)
    }

    /// Reads a decimal number. `None` if there is no such node, so that the caller takes its
    /// default.
    ///
    /// # Errors
    ///
    /// [`Error::BadValue`] if the value is anything but decimal digits, or more than 32 bits hold;
    /// those of [`Nodes`].
    fn read_u32(&self, path: &str) -> Result<Option<u32>, Error> {
        let Some(bytes) = self.read_bytes(path)? else { return Ok(None) };
        let expected = "an unsigned decimal number of at most 32 bits";
        wire::decimal_u32(&bytes)
            .map(Some)
            .ok_or_else(|| Error::BadValue { path: path.into(), expected })
    }

    /// Reads a decimal number. `None` if there is no such node, so that the caller takes its
    /// default.
    ///
    /// # Errors
    ///
    /// [`Error::BadValue`] if the value is anything but decimal digits, or more than 64 bits hold;
    /// those of [`Nodes`].
    fn read_u64(&self, path: &str) -> Result<Option<u64>, Error> {
        let Some(bytes) = self.read_bytes(path)? else { return Ok(None) };
        let expected = "an unsigned decimal number of at most 64 bits";
        wire::decimal(&bytes)
            .map(Some)
            .ok_or_else(|| Error::BadValue { path: path.into(), expected })
    }

    /// Writes a node's value. Makes the node, and those above it, if they are not there.
    ///
    /// # Errors
    ///
    /// Those of [`Nodes`].
    fn write(&self, path: &str, value: &str) -> Result<(), Error> {
        self.exchange(Operation::Write, path, value.as_bytes()).map(drop)
    }

    /// Writes a number in decimal digits, otherwise as [`write`](Self::write).
    ///
    /// # Errors
    ///
    /// Those of [`Nodes`].
    fn write_number(&self, path: &str, number: u64) -> Result<(), Error> {
        self.write(path, &format!("{number}"))
    }

    /// The names of the nodes directly below a node, in no particular order. A list that is too
    /// long for a message is taken in whatever way `xenstored` sends it.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with [`StoreErrno::NotFound`] if there is no such node or with
    /// [`StoreErrno::TooBig`] if the names are too long for `xenstored` or have 1 MiB together;
    /// [`Error::Conflict`] if nodes come and go all the time; those of [`Nodes`].
    fn directory(&self, path: &str) -> Result<Vec<String>, Error> {
        let names = match self.exchange(Operation::Directory, path, &[]) {
            Err(error) if error.errno() == Some(StoreErrno::TooBig) => list_in_parts(self, path)?,
            result => result?,
        };
        names
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8(name.into()))
            .collect::<Result<_, _>>()
            .map_err(|_| Violation::MalformedReply.into())
    }

    /// Makes a node, and those above it, with empty values. Leaves it as it is if it is there.
    ///
    /// # Errors
    ///
    /// Those of [`Nodes`].
    fn mkdir(&self, path: &str) -> Result<(), Error> {
        self.exchange(Operation::Mkdir, path, &[]).map(drop)
    }

    /// Removes a node and all below it. `false` if there was none, nor one above it.
    ///
    /// # Errors
    ///
    /// Those of [`Nodes`].
    fn remove(&self, path: &str) -> Result<bool, Error> {
        Ok(present(self.exchange(Operation::Remove, path, &[]))?.is_some())
    }

    /// Says who may do what with a node: `owner` everything, `readers` read, and all others nothing
    /// (but a privileged domain everything). Nodes that are made below it later begin with the same.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with [`StoreErrno::NotFound`] if there is no such node; those of [`Nodes`].
    fn set_permissions(
        &self,
        path: &str,
        owner: DomainId,
        readers: &[DomainId],
    ) -> Result<(), Error> {
        let mut list = format!("n{}\0", owner.0);
        for reader in readers {
            list.push_str(&format!("r{}\0", reader.0));
        }
        self.exchange(Operation::SetPermissions, path, list.as_bytes()).map(drop)
    }

    /// Whether there is such a node.
    ///
    /// # Errors
    ///
    /// Those of [`Nodes`].
    fn exists(&self, path: &str) -> Result<bool, Error> {
        Ok(self.read_bytes(path)?.is_some())
    }
}

impl<E: Exchange + ?Sized> Nodes for E {}

/// How often a list is begun again because it has changed between two of its parts.
const LIST_ATTEMPTS: u32 = 16;

/// Most parts of a list. `xenstored` fills each with as many names as fit.
const LIST_PARTS: usize = 2 * LIST_MAX / PAYLOAD_MAX;

/// A list of names that is longer than a message, part by part (`XS_DIRECTORY_PART` in Xen's
/// `docs/misc/xenstore.txt`).
fn list_in_parts<E: Exchange + ?Sized>(store: &E, path: &str) -> Result<Vec<u8>, Error> {
    for _ in 0..LIST_ATTEMPTS {
        if let Some(names) = try_list_in_parts(store, path)? {
            return Ok(names);
        }
    }
    Err(Error::Conflict { attempts: LIST_ATTEMPTS })
}

/// `None` if the list has changed meanwhile: a part holds the node's generation, then names, and
/// after the last name an empty one.
fn try_list_in_parts<E: Exchange + ?Sized>(
    store: &E,
    path: &str,
) -> Result<Option<Vec<u8>>, Error> {
    let too_big = || Error::Refused { path: path.into(), errno: StoreErrno::TooBig };
    let mut names = Vec::new();
    let mut generation = None;
    for _ in 0..LIST_PARTS {
        let offset = format!("{}\0", names.len());
        let part = store.exchange(Operation::DirectoryPart, path, offset.as_bytes());
        let part = match part {
            // An older xenstored, which has no parts.
            Err(error)
                if matches!(
                    error.errno(),
                    Some(StoreErrno::NotSupported | StoreErrno::Invalid)
                ) =>
            {
                return Err(too_big());
            }
            part => part?,
        };
        let malformed = || Error::from(Violation::MalformedReply);
        let end = part.iter().position(|&byte| byte == 0).ok_or_else(malformed)?;
        let (now, list) = (&part[..end], &part[end + 1..]);
        if generation.get_or_insert_with(|| now.to_vec()) != now {
            return Ok(None);
        }
        // Without a whole name, it would never end.
        if list.last() != Some(&0) {
            return Err(malformed());
        }
        let is_last = list.len() == 1 || list.ends_with(b"\0\0");
        names.extend_from_slice(&list[..list.len() - usize::from(is_last)]);
        if is_last {
            return Ok(Some(names));
        }
        if names.len() > LIST_MAX {
            break;
        }
    }
    Err(too_big())
}

/// A node that is not there is no error.
fn present(reply: Result<Vec<u8>, Error>) -> Result<Option<Vec<u8>>, Error> {
    match reply {
        Ok(payload) => Ok(Some(payload)),
        Err(error) if error.errno() == Some(StoreErrno::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
