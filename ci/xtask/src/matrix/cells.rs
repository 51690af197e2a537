//! The cells: what a guest does with a disk.

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::checks;
use super::columns::Back;
use super::rows::Front;
use super::served::Reached;
use crate::guests::image::Entry;
use crate::guests::transcript::Transcript;

/// What a disk grows to that grows, in MiB.
const GROWN_MIB: u64 = 96;

/// How many requests a guest makes whose backend dies again and again.
const REQUESTS: u32 = 1200;

/// How many requests a guest makes of a device that discards.
const DISCARD_REQUESTS: u32 = 500;

/// What is done in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Work {
    /// The guest does everything, and ends
    #[value(name = "default")]
    Everything,
    /// A Linux guest's disk grows while it writes
    Resize,
    /// A Linux guest keeps no grants, and Xen copies for each request
    GrantCopy,
    /// A Linux guest keeps no grants, and its pages are mapped for each request
    GrantMap,
    /// A Linux guest is destroyed while it writes; then another guest uses the disk
    FrontendCrash,
    /// The backend is killed while a Linux guest writes and verifies, and started again
    BackendKill,
    /// The same with the server that the backend has its data from
    StoreKill,
    /// A guest of ours breaks the rules of its ring, while another one works
    Hostile,
    /// The backend is killed, ended and started again with other settings, at random moments; a Linux
    /// guest judges each answer by the history of its disk
    Deaths,
    /// The same with the server that the backend has its data from, or the backend behind a driver
    /// domain
    StoreDeaths,
    /// The backend is killed, and a guest of ours publishes a new ring before it is started again, as
    /// after a kexec
    NewRings,
    /// The disk is a block device that discards and has no command to write zeroes; a Linux guest judges
    /// each answer by the history of its disk
    Discard,
}

impl Work {
    /// All there is to do beside everything, with what the table calls it.
    pub const MORE: [(Self, &str); 11] = [
        (Self::Resize, "the disk grows while the guest writes"),
        (Self::GrantCopy, "no persistent grants: Xen copies"),
        (Self::GrantMap, "no persistent grants: pages are mapped"),
        (Self::FrontendCrash, "the guest crashes while it writes"),
        (Self::BackendKill, "the backend is killed under a guest"),
        (Self::StoreKill, "the NBD server is killed under a guest"),
        (Self::Hostile, "a hostile guest beside one that works"),
        (Self::Deaths, "the backend dies at random moments, judged by the history"),
        (
            Self::StoreDeaths,
            "what it has its data from dies at random moments, judged by the history",
        ),
        (Self::NewRings, "new rings while the backend is dead, judged by the history"),
        (Self::Discard, "a device that discards and cannot write zeroes, judged by the history"),
    ];

    /// Whether it is done without being asked for. What takes many minutes on a busy machine is done with
    /// `--work` only.
    pub fn is_usual(self) -> bool {
        self != Self::StoreDeaths
    }

    /// As `target/matrix.json` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Everything => "default",
            Self::Resize => "resize",
            Self::GrantCopy => "grant-copy",
            Self::GrantMap => "grant-map",
            Self::FrontendCrash => "frontend-crash",
            Self::BackendKill => "backend-kill",
            Self::StoreKill => "store-kill",
            Self::Hostile => "hostile",
            Self::Deaths => "deaths",
            Self::StoreDeaths => "store-deaths",
            Self::NewRings => "new-rings",
            Self::Discard => "discard",
        }
    }

    /// As `matrix.sh` calls what is done.
    fn kind(self, front: Front) -> &'static str {
        match self {
            Self::Everything if front.is_linux() => "linux",
            Self::Everything => "unikernel",
            Self::Resize => "resize",
            Self::GrantCopy | Self::GrantMap => "brief",
            Self::FrontendCrash => "crash",
            Self::BackendKill => "kill-backend",
            Self::StoreKill => "kill-store",
            Self::Hostile => "hostile",
            Self::Deaths => "deaths-backend",
            Self::StoreDeaths => "deaths-store",
            Self::NewRings => "rings",
            Self::Discard => "history",
        }
    }

    /// What is on the guest's command line.
    fn words(self) -> String {
        match self {
            Self::Everything | Self::BackendKill | Self::StoreKill => String::new(),
            Self::Resize => format!("brief=1 resize={GROWN_MIB}"),
            Self::GrantCopy | Self::GrantMap => "brief=1 xen_blkfront.feature_persistent=0".into(),
            Self::FrontendCrash => "task=write".into(),
            Self::Hostile => "hostile=2013".into(),
            Self::Deaths => format!("history=11 requests={REQUESTS}"),
            Self::StoreDeaths => format!("history=12 requests={REQUESTS}"),
            Self::NewRings => "rings=13".into(),
            Self::Discard => format!("history=14 requests={DISCARD_REQUESTS}"),
        }
    }

    /// Whether the guest judges each answer by the history of its disk.
    fn has_history(self) -> bool {
        matches!(self, Self::Deaths | Self::StoreDeaths | Self::NewRings | Self::Discard)
    }

    /// By which way the backend must have reached the guest's pages, and no other.
    fn reached(self) -> Reached {
        match self {
            Self::GrantCopy => Reached::Copied,
            Self::GrantMap => Reached::Mapped,
            _ => Reached::Kept,
        }
    }
}

/// One guest on one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    /// What serves the disk.
    pub back: Back,
    /// What is done.
    pub work: Work,
    /// What drives the disk.
    pub front: Front,
}

impl Cell {
    /// The guest's name.
    pub fn name(self) -> String {
        match self.work {
            Work::Everything => self.front.name().to_owned(),
            work => format!("{}-{}", self.front.name(), work.name()),
        }
    }

    /// Whether it is part of the selection that runs with all other tests. What is left out differs from
    /// another cell in one thing that a third one has, too.
    pub fn is_brief(self) -> bool {
        match (self.work, self.front) {
            // Linux has one driver for both kinds of guest.
            (Work::Everything, Front::LinuxPv) => {
                matches!(self.back, Back::Linux | Back::PvblkdFile | Back::DriverDomain)
            }
            (Work::Everything, Front::LinuxPvh32) | (Work::Deaths, _) => {
                self.back == Back::PvblkdFile
            }
            (Work::FrontendCrash, _) => matches!(self.back, Back::PvblkdFile | Back::DriverDomain),
            // The other kill of the daemon is of this backend.
            (Work::BackendKill, _) => self.back == Back::PvblkdNbd,
            _ => true,
        }
    }

    /// How long its guests may take, in seconds of a slow machine.
    pub fn seconds(self) -> u32 {
        match self.front {
            _ if self.work.has_history() => 600,
            Front::XenBlkfront if self.work == Work::Everything => 240,
            _ => 480,
        }
    }

    /// About how long it takes, compared with our unikernel: Linux has to boot, and does more.
    pub fn length(self) -> usize {
        match (self.front, self.back) {
            (Front::XenBlkfront, _) => 1,
            // dom0 reaches that disk as a guest only.
            (_, Back::DriverDomain | Back::PvblkdMemory) => 6,
            (Front::LinuxPv | Front::LinuxPvh | Front::LinuxPvh32, _) => 4,
        }
    }

    /// A line of the list that `matrix.sh` reads; `live` if its console is to come as it is written.
    pub fn line(self, live: bool) -> String {
        let kind = self.work.kind(self.front);
        let disk = match (self.work, self.back) {
            (Work::GrantMap, _) => "mapped",
            (Work::Discard, _) => "device",
            (Work::StoreDeaths, Back::DriverDomain) => "forwarded",
            _ => "raw",
        };
        // If a history stops, the log says when.
        let how = if live || self.work.has_history() { "live" } else { "later" };
        format!("{} {kind} {} 512 {disk} {how}\n", self.name(), self.seconds())
    }

    /// The guests' configurations without their disks: name and content.
    pub fn configurations(self) -> Vec<(String, String)> {
        let name = self.name();
        let mut all = vec![(name.clone(), self.front.configuration(&name, &self.work.words()))];
        let second = match self.work {
            Work::FrontendCrash => Some(format!("{name}-next")),
            Work::Hostile => Some(format!("{name}-beside")),
            _ => None,
        };
        all.extend(second.map(|it| (it.clone(), Front::XenBlkfront.configuration(&it, ""))));
        all
    }

    /// Everything that must hold after the cell; returns how many bytes were compared. `files` is
    /// what is in the file system that our unikernel reads.
    pub fn check(self, seen: &Transcript, files: &[Entry]) -> Result<u64> {
        let unikernel = || {
            seen.check_work(files)?;
            Ok(seen.bytes_verified())
        };
        match (self.work, self.front) {
            (Work::Everything, Front::XenBlkfront) => unikernel(),
            (Work::Hostile, _) => {
                checks::hostile(seen, &self.name())?;
                unikernel().context("the guest beside the hostile one")
            }
            (Work::Deaths | Work::StoreDeaths, _) => {
                checks::deaths(seen)?;
                checks::history(seen, REQUESTS.into())
            }
            (Work::NewRings, _) => {
                checks::deaths(seen)?;
                checks::forgotten(seen)?;
                checks::history(seen, 0)
            }
            (Work::Discard, _) => {
                checks::discarded(seen)?;
                checks::history(seen, DISCARD_REQUESTS.into())
            }
            (Work::FrontendCrash, _) => {
                checks::crash(seen)?;
                unikernel().context("the guest that got the disk next")
            }
            _ => {
                let bytes = checks::linux(seen)?;
                match self.work {
                    Work::Resize => checks::grown(seen, GROWN_MIB)?,
                    Work::GrantCopy | Work::GrantMap => checks::kept_no_grants(seen)?,
                    _ => checks::whole_program(seen, self.back)?,
                }
                // A daemon that was killed has begun to count anew.
                if let Some(served) = self.back.served(seen, &self.name())? {
                    served.check(self.work.reached())?;
                }
                if self.front.is_32_bit() {
                    checks::spoke(seen, "x86_32-abi")?;
                }
                Ok(bytes)
            }
        }
    }
}
