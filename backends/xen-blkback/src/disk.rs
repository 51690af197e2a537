//! What is exported.

use pvblk::command::Features;
use pvblk::extent::Geometry;

/// A disk, as its frontend is to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Size, sectors, mode. The toolstack may make it read-only besides (`mode`).
    pub geometry: Geometry,
    /// What it does besides reading and writing. The toolstack may forbid to discard
    /// (`discard-enable`).
    pub features: Features,
    /// `VDISK_CDROM`; also if the toolstack says so (`device-type`).
    pub cdrom: bool,
    /// `VDISK_REMOVABLE`; also if the toolstack says so (`removable`).
    pub removable: bool,
}

/// Something that a disk does besides reading and writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Feature {
    /// `feature-flush-cache`
    Flush,
    /// `feature-barrier`
    Barrier,
    /// `feature-discard`
    Discard,
    /// `discard-secure`
    SecureDiscard,
}

impl Feature {
    pub(crate) fn node(self) -> &'static str {
        match self {
            Self::Flush => "feature-flush-cache",
            Self::Barrier => "feature-barrier",
            Self::Discard => "feature-discard",
            Self::SecureDiscard => "discard-secure",
        }
    }

    pub(crate) fn take_from(self, features: &mut Features) {
        match self {
            Self::Flush => features.flush = false,
            Self::Barrier => features.barrier = false,
            Self::Discard => (features.discard, features.secure_discard) = (None, false),
            Self::SecureDiscard => features.secure_discard = false,
        }
    }
}
