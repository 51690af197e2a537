//! A vbd as the toolstack describes it in the backend's directory.

use alloc::format;
use alloc::string::String;

use pvblk_xen::platform::DomainId;
use pvblk_xen::store::{Error as StoreError, ErrorKind, Nodes, StoreErrno};

use crate::error::Error;
use crate::restricted::Restrictions;

/// The first number that no domain has (`DOMID_FIRST_RESERVED` of `xen/include/public/xen.h`).
const FIRST_RESERVED_DOMAIN: u32 = 0x7FF0;

/// What the toolstack said when it made the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The backend's directory.
    pub path: String,
    /// The frontend's directory.
    pub frontend_path: String,
    /// The frontend's domain.
    pub frontend_id: DomainId,
    /// The number that says which disk this is: `0xCA00` (51712) is `xvda`.
    pub virtual_device: u32,
    /// The name that the guest's owner gave it (`dev`); empty if there is none.
    pub name: String,
    /// What the guest may not do: write if `mode` has no `w`, discard if `discard-enable` is 0.
    pub restrictions: Restrictions,
    /// Whether it is to look like a CD-ROM drive (`device-type`).
    pub cdrom: bool,
    /// Whether it is to look removable (`removable`).
    pub removable: bool,
}

/// What the toolstack and its script say about what a device is to be served from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Medium {
    /// `params`: what the guest's configuration has as the disk's target.
    pub params: String,
    /// `type`: `phy` for all that is not QEMU's affair.
    pub kind: String,
    /// `physical-device-path`: the block device that a hotplug script made of it.
    pub physical_path: Option<String>,
}

impl Device {
    /// Reads the description in the directory `path`, which is absolute.
    pub(crate) fn read(nodes: &impl Nodes, path: &str) -> Result<Self, Error> {
        let virtual_device = path
            .rsplit('/')
            .next()
            .and_then(decimal)
            .filter(|_| path.starts_with('/'))
            .ok_or_else(|| {
                bad("path", path, "an absolute path that ends in a number is expected")
            })?;

        let id = nodes.read(&format!("{path}/frontend-id"))?;
        let frontend_id = domain_id(&id)
            .ok_or_else(|| bad("frontend-id", &id, "the number of a domain is expected"))?;

        let frontend_path = nodes.read(&format!("{path}/frontend"))?;
        if !frontend_path.starts_with(&format!("/local/domain/{id}/")) {
            return Err(bad(
                "frontend",
                &frontend_path,
                "a path in the frontend's home is expected",
            ));
        }

        let text = |node: &str| optional_text(nodes, path, node);
        let mode = text("mode")?;
        let removable = text("removable")?;
        let discard = text("discard-enable")?;
        let restrictions = Restrictions {
            read_only: !mode.is_some_and(|mode| mode.contains('w')),
            no_discard: discard.is_some_and(|flag| flag == "0"),
        };
        Ok(Self {
            path: path.into(),
            frontend_path,
            frontend_id,
            virtual_device,
            name: text("dev")?.unwrap_or_default(),
            restrictions,
            cdrom: text("device-type")?.as_deref() == Some("cdrom"),
            removable: removable.is_some_and(|flag| flag != "0"),
        })
    }
}

impl Medium {
    pub(crate) fn read(nodes: &impl Nodes, path: &str) -> Result<Self, StoreError> {
        let text = |node: &str| optional_text(nodes, path, node);
        Ok(Self {
            params: text("params")?.unwrap_or_default(),
            kind: text("type")?.unwrap_or_default(),
            physical_path: text("physical-device-path")?,
        })
    }
}

/// Whether a frontend's directory is there.
pub(crate) fn has_frontend(nodes: &impl Nodes, path: &str) -> Result<bool, StoreError> {
    match nodes.exists(path) {
        // What a driver domain is told of a home that is gone.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(false),
        result => result,
    }
}

/// A node that may be missing. One that is not text counts as missing.
pub(crate) fn optional_text(
    nodes: &impl Nodes,
    path: &str,
    node: &str,
) -> Result<Option<String>, StoreError> {
    match nodes.read_optional(&format!("{path}/{node}")) {
        Err(StoreError::BadValue { .. }) => Ok(None),
        result => result,
    }
}

fn bad(node: &'static str, value: &str, reason: &'static str) -> Error {
    Error::BadDevice { node, value: value.into(), reason }
}

/// A number as XenStore's users write it: decimal digits, and no zero in front.
pub(crate) fn decimal(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let canonical = text == "0" || !text.starts_with('0');
    if plain && canonical { text.parse().ok() } else { None }
}

pub(crate) fn domain_id(text: &str) -> Option<DomainId> {
    let number = decimal(text).filter(|number| *number < FIRST_RESERVED_DOMAIN)?;
    u16::try_from(number).ok().map(DomainId)
}

/// Whether an error about a node of the frontend's directory is the frontend's own doing: it may
/// write there what it likes, remove it, and forbid us to look.
pub(crate) fn is_peers_doing(error: &StoreError) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::BadValue | ErrorKind::NotFound)
        || error.errno() == Some(StoreErrno::Invalid)
}
