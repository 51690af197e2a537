//! Devices in XenStore: where they are, and the states that both ends of one go through.
//!
//! A device has a directory at each end, the frontend's in its domain (`device/vbd/51712`) and the
//! backend's in another (`/local/domain/0/backend/vbd/1/51712`). Each end writes only to its own,
//! and watches the node `state` of the other (`xen/include/public/io/xenbus.h`).

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::platform::{Clock, DomainId, StoreTransport};
use crate::store::{self, Error, Nodes, Store};

/// The first number that no domain has (`DOMID_FIRST_RESERVED` of `xen/include/public/xen.h`).
const FIRST_RESERVED_DOMAIN: u32 = 0x7FF0;

/// Bytes of an error message that are written to XenStore. A request of 4096 bytes holds its path,
/// too, and a domain that is not privileged may have nodes of 2048 bytes as xenstored is shipped.
const MESSAGE_MAX: usize = 1024;

/// The state of one end of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// No state that we know: the node is missing, or holds something else.
    #[default]
    Unknown = 0,
    /// The end has not begun yet.
    Initialising = 1,
    /// The end has begun, and waits for the other one.
    InitWait = 2,
    /// The end has published its part of the connection.
    Initialised = 3,
    /// The end is connected.
    Connected = 4,
    /// The end is shutting the connection down, or wants the other end to.
    Closing = 5,
    /// The end has shut the connection down.
    Closed = 6,
    /// The end is changing its configuration.
    Reconfiguring = 7,
    /// The end has changed its configuration.
    Reconfigured = 8,
}

impl State {
    /// The state with this number, [`Unknown`](Self::Unknown) if there is none.
    pub fn from_number(number: u64) -> Self {
        match number {
            1 => Self::Initialising,
            2 => Self::InitWait,
            3 => Self::Initialised,
            4 => Self::Connected,
            5 => Self::Closing,
            6 => Self::Closed,
            7 => Self::Reconfiguring,
            8 => Self::Reconfigured,
            _ => Self::Unknown,
        }
    }

    /// The state's number in XenStore.
    pub fn number(self) -> u64 {
        self as u64
    }
}

impl fmt::Display for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// Reads the state of the end whose directory is `device`.
///
/// # Errors
///
/// Those of [`Nodes`], but not for a missing or a senseless node: that is [`State::Unknown`].
pub fn read_state(nodes: &impl Nodes, device: &str) -> Result<State, Error> {
    let value = nodes.read_bytes(&format!("{device}/state"))?;
    Ok(value.and_then(|digits| store::decimal(&digits)).map_or(State::Unknown, State::from_number))
}

/// Writes the state of the end whose directory is `device`, even if it is the same as before: a
/// backend tells so that its disk has another size.
///
/// # Errors
///
/// Those of [`Nodes`].
pub fn write_state(nodes: &impl Nodes, device: &str, state: State) -> Result<(), Error> {
    nodes.write_number(&format!("{device}/state"), state.number())
}

/// Changes the state of the end whose directory is `device`, if it has a state and that is another
/// one. `false` if there is no state any more.
///
/// A device that is being removed loses its directory. Writing to it would make it anew, and leave
/// a device behind that nobody wants; writing the same state would wake the other end for nothing.
///
/// # Errors
///
/// Those of [`Store::transaction`].
pub fn switch_state<T: StoreTransport + Clock>(
    store: &Store<T>,
    device: &str,
    state: State,
) -> Result<bool, Error> {
    store.transaction(|transaction| {
        if !transaction.exists(&format!("{device}/state"))? {
            return Ok(false);
        }
        if read_state(transaction, device)? != state {
            write_state(transaction, device, state)?;
        }
        Ok(true)
    })
}

/// The numbers of this domain's devices of a class (`"vbd"`), ascending.
///
/// # Errors
///
/// Those of [`Nodes`], but not if there is no device: the list is empty then.
pub fn devices(nodes: &impl Nodes, class: &str) -> Result<Vec<u32>, Error> {
    let names = match nodes.directory(&format!("device/{class}")) {
        Err(error) if error.errno() == Some(store::StoreErrno::NotFound) => return Ok(Vec::new()),
        names => names?,
    };
    let mut numbers: Vec<u32> =
        names.iter().filter_map(|name| store::decimal_u32(name.as_bytes())).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// A device of this domain, as the toolstack describes it to the frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The frontend's directory, relative to this domain's home.
    pub path: String,
    /// The backend's directory.
    pub backend_path: String,
    /// The domain that the backend runs in.
    pub backend_id: DomainId,
    /// The number that says which disk this is: `0xCA00` (51712) is `xvda`.
    pub virtual_device: u32,
}

impl Device {
    /// Reads the description of the device with this number in the list of [`devices`].
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with [`StoreErrno::NotFound`](store::StoreErrno::NotFound) if the device
    /// is gone, or has no backend; [`Error::BadValue`] if its description makes no sense; those of
    /// [`Nodes`].
    pub fn read(nodes: &impl Nodes, class: &str, number: u32) -> Result<Self, Error> {
        let path = format!("device/{class}/{number}");
        let node = format!("{path}/backend");
        let backend_path = nodes.read(&node)?;
        if !backend_path.starts_with('/') || !store::is_path(&backend_path) {
            return Err(Error::BadValue { path: node, expected: "an absolute path" });
        }

        let node = format!("{path}/backend-id");
        let backend_id = nodes.read_u32(&node)?.ok_or_else(|| Error::Refused {
            path: node.clone(),
            errno: store::StoreErrno::NotFound,
        })?;
        let backend_id = u16::try_from(backend_id)
            .ok()
            .filter(|_| backend_id < FIRST_RESERVED_DOMAIN)
            .map(DomainId)
            .ok_or(Error::BadValue { path: node, expected: "the number of a domain" })?;

        // Numbers that old frontends would misread are in a node of another name.
        let virtual_device = match nodes.read_u32(&format!("{path}/virtual-device"))? {
            Some(number) => Some(number),
            None => nodes.read_u32(&format!("{path}/virtual-device-ext"))?,
        };
        let virtual_device = virtual_device.unwrap_or(number);
        Ok(Self { path, backend_path, backend_id, virtual_device })
    }
}

/// Tells the toolstack why a device failed, as far as that is possible: in the node
/// `error/device/vbd/51712/error` of the domain's home, say, with the value `22 bad ring-ref`.
///
/// `device` is the directory of this end, `errno` the (positive) number of the error as on Linux.
/// Nothing is written about a device that is gone: it would stay for good. What goes wrong here is
/// not reported: there is something worse to report already.
pub fn report_error<T: StoreTransport + Clock>(
    store: &Store<T>,
    device: &str,
    errno: u32,
    message: &str,
) {
    let value = format!("{errno} {message}");
    let node = error_path(device);
    let _ = store.transaction(|nodes| match nodes.exists(&format!("{device}/state"))? {
        true => nodes.write(&node, shorten(&value)),
        false => Ok(()),
    });
}

/// The beginning of a message, as long as XenStore takes it: at most 1024 bytes, in whole characters.
pub fn shorten(message: &str) -> &str {
    &message[..message.floor_char_boundary(MESSAGE_MAX)]
}

/// Takes back what [`report_error`] said about a device, which works now, or is over.
pub fn forget_error<T: StoreTransport + Clock>(store: &Store<T>, device: &str) {
    // If it stays, it is out of date, and nothing worse.
    let _ = remove_directory(store, &error_folder(device));
}

/// Removes a device's directory, and the folder that it is in if that is empty then: the guest's.
/// `false` if there was none.
///
/// # Errors
///
/// Those of [`Nodes`], as far as the directory is concerned.
pub fn remove_directory<T: StoreTransport + Clock>(
    store: &Store<T>,
    directory: &str,
) -> Result<bool, Error> {
    let removed = store.remove(directory)?;
    if removed {
        remove_empty_folder(store, directory);
    }
    Ok(removed)
}

/// Removes the folder that a device's directory was in, if nothing else is in it.
pub fn remove_empty_folder<T: StoreTransport + Clock>(store: &Store<T>, directory: &str) {
    let Some((folder, _)) = directory.rsplit_once('/') else { return };
    // In a transaction of its own: the one that removed what was in it must not (EIO). What fails is
    // no harm: it is an empty folder, or the toolstack's, which removes it then.
    let _ = store.transaction(|nodes| match nodes.directory(folder)?.is_empty() {
        true => nodes.remove(folder),
        false => Ok(false),
    });
}

/// The node that [`report_error`] writes.
pub fn error_path(device: &str) -> String {
    format!("{}/error", error_folder(device))
}

/// What is said about a device is below `error` in the home that its directory is in.
fn error_folder(device: &str) -> String {
    let in_home = |rest: &str| {
        let (domain, device) = rest.split_once('/')?;
        Some(format!("/local/domain/{domain}/error/{device}"))
    };
    device
        .strip_prefix("/local/domain/")
        .and_then(in_home)
        .unwrap_or_else(|| format!("error/{}", device.trim_start_matches('/')))
}
