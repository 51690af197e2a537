//! Why Xen cannot be reached from this process.

use std::fmt;
use std::io;

/// A device of Linux's Xen drivers, or the daemon's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// `/dev/xen/gntdev`: other domains' grants.
    GrantMapping,
    /// `/dev/xen/gntalloc`: grants of our own.
    GrantAllocation,
    /// `/dev/xen/evtchn`: event channels.
    EventChannels,
    /// `/dev/xen/xenbus`: XenStore through the kernel.
    XenBus,
    /// The socket of a `xenstored` that is a process of this domain.
    StoreSocket,
}

impl Device {
    /// Where it is.
    pub const fn path(self) -> &'static str {
        match self {
            Self::GrantMapping => "/dev/xen/gntdev",
            Self::GrantAllocation => "/dev/xen/gntalloc",
            Self::EventChannels => "/dev/xen/evtchn",
            Self::XenBus => "/dev/xen/xenbus",
            Self::StoreSocket => "/run/xenstored/socket",
        }
    }

    /// What makes it be there.
    const fn remedy(self) -> &'static str {
        match self {
            Self::GrantMapping => "load its module: modprobe xen-gntdev",
            Self::GrantAllocation => "load its module: modprobe xen-gntalloc",
            Self::EventChannels => "load its module: modprobe xen-evtchn",
            Self::XenBus => "the kernel must have CONFIG_XEN_BACKEND or be a Xen guest's",
            Self::StoreSocket => "start xenstored",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.path())
    }
}

/// Why a device could not be opened, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Linux does not run on Xen here.
    #[error("cannot open {device}: this is not a Xen host or guest")]
    NotXen {
        /// What was to be opened.
        device: Device,
    },
    /// Linux runs on Xen, but the device is not there.
    #[error("{device} is not there: {}", .device.remedy())]
    Missing {
        /// What was to be opened.
        device: Device,
    },
    /// This user may not open it.
    #[error("{device} may not be opened: run as root")]
    PermissionDenied {
        /// What was to be opened.
        device: Device,
    },
    /// The kernel's pages are not Xen's 4096 bytes, so that it cannot map single grants.
    #[error("this kernel's pages are of {bytes} bytes: grants need one with pages of 4096")]
    PageSize {
        /// Bytes in a page of the kernel's.
        bytes: usize,
    },
    /// Anything else.
    #[error("cannot open {device}: {cause}")]
    Other {
        /// What was to be opened.
        device: Device,
        /// What the system said.
        cause: io::Error,
    },
}

/// The sorts of [`OpenError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// Linux does not run on Xen here, or not with pages that grants can be.
    Unsupported,
    /// A device is not there.
    Missing,
    /// This user may not.
    PermissionDenied,
    /// Anything else.
    Other,
}

impl OpenError {
    /// Sorts the error.
    pub fn kind(&self) -> OpenErrorKind {
        match self {
            Self::NotXen { .. } | Self::PageSize { .. } => OpenErrorKind::Unsupported,
            Self::Missing { .. } => OpenErrorKind::Missing,
            Self::PermissionDenied { .. } => OpenErrorKind::PermissionDenied,
            Self::Other { .. } => OpenErrorKind::Other,
        }
    }

    /// Says what `cause` means for `device`.
    pub(crate) fn new(device: Device, cause: io::Error) -> Self {
        match cause.kind() {
            io::ErrorKind::PermissionDenied => Self::PermissionDenied { device },
            // A driver that is there but finds no Xen says that there is no device.
            _ if !runs_on_xen() => Self::NotXen { device },
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::Missing { device },
            _ => Self::Other { device, cause },
        }
    }
}

/// Whether Linux says that it runs on Xen.
fn runs_on_xen() -> bool {
    std::fs::read("/sys/hypervisor/type").is_ok_and(|name| name.starts_with(b"xen"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_to_do() {
        let device = Device::GrantMapping;
        let text = OpenError::Missing { device }.to_string();
        assert_eq!(text, "/dev/xen/gntdev is not there: load its module: modprobe xen-gntdev");
        let denied = OpenError::new(device, io::ErrorKind::PermissionDenied.into());
        assert_eq!(denied.kind(), OpenErrorKind::PermissionDenied);
        assert!(denied.to_string().contains("run as root"));
    }

    #[test]
    fn without_xen_everything_says_so() {
        if runs_on_xen() {
            return;
        }
        let error = OpenError::new(Device::EventChannels, io::ErrorKind::NotFound.into());
        assert_eq!(error.kind(), OpenErrorKind::Unsupported);
    }
}
