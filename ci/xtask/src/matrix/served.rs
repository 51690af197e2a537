//! What our backends say that they have done for a guest.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::guests::transcript::Transcript;

/// The guest's name for the disk.
const DISK: &str = "xvdb";

/// By which way a backend reaches a guest's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// Kept mapped from their first use on.
    Kept,
    /// Copied by Xen for each request.
    Copied,
    /// Mapped for each request.
    Mapped,
}

/// How often each way was gone for one guest's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Served {
    #[serde(rename = "kept_mapped")]
    kept: u64,
    copied: u64,
    mapped: u64,
}

/// What is used of a disk in `pvblkd list --json`.
#[derive(Deserialize)]
struct Disk {
    guest: String,
    disk: String,
    queues: Vec<Served>,
}

impl Served {
    /// As the daemon lists it, the last time that it was asked.
    pub fn by_daemon(seen: &Transcript, guest: &str) -> Result<Self> {
        let list = seen.reports.iter().filter_map(|line| line.strip_prefix("SERVED ")).next_back();
        let list = list.context("the daemon was not asked what it serves")?;
        let disks: Vec<Disk> = serde_json::from_str(list).context("pvblkd list --json")?;
        let disk = disks.iter().find(|it| it.guest == guest && it.disk == DISK);
        let queues = &disk.context("the daemon does not list the guest's disk")?.queues;
        Ok(queues.iter().fold(Self::default(), |sum, queue| sum.plus(*queue)))
    }

    /// As the driver domain prints it when a disk is closed, which may be several times.
    pub fn by_driver_domain(seen: &Transcript) -> Result<Self> {
        let mut sum = None;
        for line in seen.reports.iter().filter(|line| line.starts_with("storage: xvdb of domain")) {
            let before = |words: &str| {
                let number = line.split_once(words)?.0.rsplit(' ').next()?;
                number.parse().ok()
            };
            let (Some(kept), Some(mapped), Some(copied)) = (
                before(" pages mapped to keep"),
                before(" for one request"),
                before(" segments copied"),
            ) else {
                continue;
            };
            sum = Some(sum.unwrap_or(Self::default()).plus(Self { kept, copied, mapped }));
        }
        sum.context("the driver domain does not say what it did")
    }

    fn plus(self, other: Self) -> Self {
        Self {
            kept: self.kept + other.kept,
            copied: self.copied + other.copied,
            mapped: self.mapped + other.mapped,
        }
    }

    /// One way was gone, and no other.
    pub fn check(&self, wanted: Reached) -> Result<()> {
        let ways = [
            (Reached::Kept, self.kept),
            (Reached::Copied, self.copied),
            (Reached::Mapped, self.mapped),
        ];
        for (way, count) in ways {
            ensure!((count > 0) == (way == wanted), "pages were to be {wanted:?}: {self:?}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(report: &str) -> Transcript {
        Transcript { reports: vec![report.into()], ..Transcript::default() }
    }

    const COPIED: Served = Served { kept: 0, copied: 9, mapped: 0 };

    #[test]
    fn the_daemon_s_list_is_read() {
        let queue = r#"{"kept_mapped": 0, "copied": 4, "mapped": 0, "reads": 1}"#;
        let other = r#"{"kept_mapped": 0, "copied": 5, "mapped": 0}"#;
        let list = seen(&format!(
            r#"SERVED [{{"guest": "a", "disk": "xvdb", "queues": [{queue}, {other}]}}]"#
        ));
        assert_eq!(Served::by_daemon(&list, "a").unwrap(), COPIED);
        assert!(Served::by_daemon(&list, "b").is_err());
        assert!(Served::by_daemon(&seen("SERVED ["), "a").is_err());
        assert!(Served::by_daemon(&Transcript::default(), "a").is_err());
    }

    #[test]
    fn the_driver_domain_s_lines_are_read() {
        let line = "xvdb of domain 2: 0 pages mapped to keep and 0 for one request, 0 given up, 9 \
                    segments copied, 0 refused, in 8 batches";
        let found = Served::by_driver_domain(&seen(&format!("storage: {line}"))).unwrap();
        assert_eq!(found, COPIED);
        let other = seen("storage: xvdb of domain 2: over");
        assert!(Served::by_driver_domain(&other).is_err());
    }

    #[test]
    fn one_way_and_no_other() {
        COPIED.check(Reached::Copied).unwrap();
        assert!(COPIED.check(Reached::Mapped).is_err());
        assert!(Served { kept: 1, ..COPIED }.check(Reached::Copied).is_err());
        assert!(Served::default().check(Reached::Kept).is_err());
    }
}
