//! The columns: backends. What each needs in dom0, and the script that starts it there.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;

use super::cells::Work;
use super::rows::Front;
use super::served::Served;
use crate::bare;
use crate::guests::transcript::Transcript;
use crate::host;
use crate::project;
use crate::rig::{Overlay, Rig};

/// What a guest's disk is served by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Back {
    /// Linux's xen-blkback
    Linux,
    /// QEMU's qdisk
    Qdisk,
    /// `pvblkd`, from a file
    PvblkdFile,
    /// `pvblkd`, from memory
    PvblkdMemory,
    /// `pvblkd`, from an NBD server
    PvblkdNbd,
    /// Our bare-metal driver domain, from its memory
    DriverDomain,
}

/// What a boot needs so that a backend can be started in it.
#[derive(Default)]
pub struct Needs {
    /// Files that dom0 finds under the paths given.
    pub copies: Vec<(String, PathBuf)>,
    /// Programs with their libraries.
    pub overlays: Vec<PathBuf>,
    /// More words for Xen's command line.
    pub xen_arguments: &'static str,
}

const QEMU: Overlay = Overlay {
    name: "qemu",
    packages: &["qemu-system-xen"],
    // libxl starts it by this path.
    programs: &[("usr/libexec/xen-qemu-system-i386", "usr/libexec/xen-qemu-system-i386")],
    // libxl asks for a screen by VNC that is never shown; without a keymap QEMU ends at once.
    files: &["usr/share/qemu/keymaps/en-us"],
};

const NBDKIT_FILE: &str = "usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-file-plugin.so";

const NBDKIT: Overlay = Overlay {
    name: "nbdkit",
    packages: &["nbdkit"],
    programs: &[("usr/bin/nbdkit", "bin/nbdkit"), (NBDKIT_FILE, NBDKIT_FILE)],
    files: &[],
};

impl Back {
    /// As `target/matrix.json` and the command line have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Qdisk => "qdisk",
            Self::PvblkdFile => "pvblkd-file",
            Self::PvblkdMemory => "pvblkd-memory",
            Self::PvblkdNbd => "pvblkd-nbd",
            Self::DriverDomain => "driver-domain",
        }
    }

    /// As the table has it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Linux => "Linux xen-blkback",
            Self::Qdisk => "QEMU qdisk",
            Self::PvblkdFile => "pvblkd, file",
            Self::PvblkdMemory => "pvblkd, memory",
            Self::PvblkdNbd => "pvblkd, NBD",
            Self::DriverDomain => "driver domain",
        }
    }

    /// The file of `ci/rig/backends` that knows how to start it.
    pub fn script(self) -> PathBuf {
        project::rig_scripts().join("backends").join(match self {
            Self::Linux => "blkback.sh",
            Self::Qdisk => "qdisk.sh",
            Self::PvblkdFile => "pvblkd-file.sh",
            Self::PvblkdMemory => "pvblkd-memory.sh",
            Self::PvblkdNbd => "pvblkd-nbd.sh",
            Self::DriverDomain => "driver-domain.sh",
        })
    }

    /// Whether it has discard, and what was discarded reads as zeroes.
    pub fn discards(self) -> bool {
        match self {
            // Holes are punched into a file, or pages are given up.
            Self::Linux | Self::Qdisk => true,
            Self::PvblkdFile | Self::PvblkdMemory | Self::PvblkdNbd => true,
            Self::DriverDomain => true,
        }
    }

    /// What it says that it has done for `guest`, if it is one of ours.
    pub fn served(self, seen: &Transcript, guest: &str) -> Result<Option<Served>> {
        Ok(match self {
            Self::Linux | Self::Qdisk => None,
            Self::PvblkdFile | Self::PvblkdMemory | Self::PvblkdNbd => {
                Some(Served::by_daemon(seen, guest)?)
            }
            Self::DriverDomain => Some(Served::by_driver_domain(seen)?),
        })
    }

    /// Whether `front` is tried with it.
    pub fn serves(self, front: Front) -> bool {
        // One of ours, and Linux's to compare: a boot of its own each.
        !front.is_32_bit() || matches!(self, Self::Linux | Self::PvblkdFile)
    }

    /// Whether `work` can be done with it.
    pub fn can(self, work: Work) -> bool {
        match work {
            Work::Everything | Work::FrontendCrash => true,
            Work::Resize | Work::GrantMap | Work::NewRings | Work::Discard => {
                self == Self::PvblkdFile
            }
            Work::GrantCopy | Work::Hostile => {
                matches!(self, Self::PvblkdFile | Self::DriverDomain)
            }
            // What is in a program's memory dies with it.
            Work::BackendKill => matches!(self, Self::PvblkdFile | Self::PvblkdNbd),
            Work::StoreKill => self == Self::PvblkdNbd,
            Work::StoreDeaths => matches!(self, Self::PvblkdNbd | Self::DriverDomain),
            // The daemon's memory is in files of a tmpfs, which outlive it.
            Work::Deaths => {
                matches!(self, Self::PvblkdFile | Self::PvblkdMemory | Self::PvblkdNbd)
            }
        }
    }

    /// Builds and fetches what it needs.
    pub fn prepare(self, rig: &Rig) -> Result<Needs> {
        let pvblkd = || -> Result<Vec<(String, PathBuf)>> {
            let scripts = project::rig_scripts().join("backends");
            Ok(vec![
                ("bin/pvblkd".into(), host::build("pvblkd")?),
                ("pvblkd.sh".into(), scripts.join("pvblkd.sh")),
            ])
        };
        Ok(match self {
            Self::Linux => Needs::default(),
            Self::Qdisk => Needs { overlays: vec![rig.overlay(&QEMU)?], ..Needs::default() },
            Self::PvblkdFile | Self::PvblkdMemory => {
                Needs { copies: pvblkd()?, ..Needs::default() }
            }
            Self::PvblkdNbd => Needs {
                copies: pvblkd()?,
                overlays: vec![rig.overlay(&NBDKIT)?],
                ..Needs::default()
            },
            Self::DriverDomain => {
                let image = bare::build(bare::X86_64, "driver-domain", &[])?;
                let mut copies = pvblkd()?;
                copies.push(("guests/driver-domain".into(), image));
                Needs { copies, ..Needs::default() }
            }
        })
    }
}
