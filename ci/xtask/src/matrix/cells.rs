//! The cells: what a guest does with a disk, and what must be true afterwards.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::columns::Back;
use super::rows::Front;
use crate::guests::image::{Entry, compare};
use crate::guests::transcript::{Transcript, value};

/// Files that a Linux guest writes: fewer means that something was not written at all.
const FILES: usize = 34;

/// Pages of any guest that dom0 has mapped: XenStore's and the console's.
const OWN_PAGES: u64 = 2;

/// What is done in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// The guest does everything, and ends.
    Everything,
    /// A Linux guest is destroyed while it writes; then another guest uses the disk.
    FrontendCrash,
    /// The backend is killed while a Linux guest writes and verifies, and started again.
    BackendKill,
    /// The same with the server that the backend has its data from.
    StoreKill,
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
            Work::FrontendCrash => format!("{}-crash", self.front.name()),
            Work::BackendKill => format!("{}-backend-kill", self.front.name()),
            Work::StoreKill => format!("{}-store-kill", self.front.name()),
        }
    }

    /// As `target/matrix.json` has it.
    pub fn options(self) -> &'static str {
        match self.work {
            Work::Everything => "default",
            Work::FrontendCrash => "frontend-crash",
            Work::BackendKill => "backend-kill",
            Work::StoreKill => "store-kill",
        }
    }

    /// How long its guests may take, in seconds of a slow machine.
    pub fn seconds(self) -> u32 {
        match self.front {
            Front::XenBlkfront => 120,
            Front::LinuxPv | Front::LinuxPvh => 240,
        }
    }

    /// A line of the list that `matrix.sh` reads; `live` if its console is to come as it is written.
    pub fn line(self, live: bool) -> String {
        let kind = match (self.work, self.front) {
            (Work::FrontendCrash, _) => "crash",
            (Work::BackendKill, _) => "kill-backend",
            (Work::StoreKill, _) => "kill-store",
            (Work::Everything, Front::XenBlkfront) => "unikernel",
            (Work::Everything, _) => "linux",
        };
        let how = if live { "live" } else { "later" };
        format!("{} {kind} {} 512 {how}\n", self.name(), self.seconds())
    }

    /// The guests' configurations without their disks: name and content.
    pub fn configurations(self) -> Vec<(String, String)> {
        let name = self.name();
        let mut words = String::new();
        if self.work == Work::FrontendCrash {
            words.push_str("task=write");
        }
        let mut all = vec![(name.clone(), self.front.configuration(&name, &words))];
        if self.work == Work::FrontendCrash {
            let next = format!("{name}-next");
            all.push((next.clone(), Front::XenBlkfront.configuration(&next, "")));
        }
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
            (Work::Everything | Work::BackendKill | Work::StoreKill, _) => self.check_linux(seen),
            (Work::FrontendCrash, _) => {
                check_crash(seen)?;
                unikernel().context("the guest that got the disk next")
            }
        }
    }

    fn check_linux(self, seen: &Transcript) -> Result<u64> {
        seen.check_end()?;
        let said = |prefix: &'static str| {
            let last = seen.after(prefix).last();
            last.with_context(|| format!("the guest did not say {prefix}"))
        };
        let found = |prefix: &'static str| {
            seen.reports.iter().filter_map(move |line| line.strip_prefix(prefix))
        };

        let tree: Vec<Entry> = seen.after("FILE ").filter_map(Entry::parse).collect();
        ensure!(tree.len() >= FILES, "the guest wrote {} files, not {FILES}", tree.len());
        let other: Vec<Entry> = found("FOUND FILE ").filter_map(Entry::parse).collect();
        compare(&tree, &other).context("dom0's view of the file system (as `the guest`)")?;

        let ranges = ranges(seen.after("RANGE "))?;
        let other = self::ranges(found("FOUND RANGE "))?;
        ensure!(ranges.len() >= 3, "the guest told {} ranges only", ranges.len());
        for (range, digest) in &ranges {
            match other.get(range) {
                Some(same) if same == digest => {}
                Some(_) => bail!("RANGE {range}: dom0 finds something else there"),
                None => bail!("RANGE {range}: dom0 did not look"),
            }
        }

        let fio: u64 = said("FIO ")?.trim().parse().context("FIO")?;
        ensure!(fio > 0, "fio wrote nothing");
        let negotiated = said("NEGOTIATED ")?;
        let flushes: u64 = said("FLUSHES ")?.trim().parse().context("FLUSHES")?;
        if value(negotiated, "cache") == Some("write-back") {
            ensure!(flushes > 0, "the disk offers flushes, and none was sent");
        }
        match (self.back.discards(), said("DISCARD ")?) {
            (true, "zeroes") | (false, "none") => {}
            (promised, came) => bail!("it has discard: {promised}; what came of it: {came}"),
        }
        let mib: u64 =
            ranges.keys().filter_map(|range| range.split_once(' ')?.1.parse::<u64>().ok()).sum();
        Ok(tree.iter().map(|file| file.size).sum::<u64>() + (fio << 10) + (mib << 20))
    }
}

/// Digests by `OFFSET MIB`; one range may be told again, but not otherwise.
fn ranges<'a>(lines: impl Iterator<Item = &'a str>) -> Result<BTreeMap<&'a str, &'a str>> {
    let mut all = BTreeMap::new();
    for line in lines {
        let (range, digest) = line.trim().rsplit_once(' ').context("a range without a digest")?;
        if let Some(before) = all.insert(range, digest)
            && before != digest
        {
            bail!("RANGE {range}: first {before}, then {digest}");
        }
    }
    Ok(all)
}

/// The destroyed guest had pages mapped, and all of them came back.
fn check_crash(seen: &Transcript) -> Result<()> {
    let report = |prefix: &str| {
        let line = seen.reports.iter().find_map(|line| line.strip_prefix(prefix));
        line.with_context(|| format!("dom0 did not report {prefix}"))
    };
    let mapped: u64 = report("MAPPED ")?.parse().context("MAPPED")?;
    ensure!(mapped > OWN_PAGES, "the guest's disk was not mapped when the guest was destroyed");
    match report("LEFT ")? {
        "0 0" => Ok(()),
        left => bail!("grants still mapped, domains that cannot go: {left}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> (Cell, Transcript) {
        let digest = "ab".repeat(32);
        let cell = Cell { back: Back::Linux, work: Work::Everything, front: Front::LinuxPvh };
        let mut seen = Transcript::default();
        let mut both = Vec::new();
        both.extend((0..FILES).map(|number| format!("FILE {digest} 7 /file {number}")));
        both.extend([33, 54, 60].map(|offset| format!("RANGE {offset} 1 {digest}")));
        for line in both {
            seen.take_report(&format!("FOUND {line}"));
            seen.lines.push(line);
        }
        for line in ["NEGOTIATED device=xvdb cache=write-back", "FIO 9", "FLUSHES 1"] {
            seen.lines.push(line.into());
        }
        seen.lines.extend(["DISCARD zeroes".into(), "VERDICT PASS".into()]);
        seen.take_report("ENDED poweroff");
        (cell, seen)
    }

    #[test]
    fn a_good_run_passes() {
        let (cell, seen) = good();
        let bytes = FILES as u64 * 7 + (9 << 10) + (3 << 20);
        assert_eq!(cell.check(&seen, &[]).unwrap(), bytes);
    }

    #[test]
    fn each_missing_or_wrong_line_fails() {
        type Change = fn(&mut Transcript);
        let changes: [Change; 8] = [
            |t| drop(t.lines.remove(0)),
            |t| drop(t.reports.remove(0)),
            |t| drop(t.reports.pop()),
            |t| t.reports.push("FOUND RANGE 33 1 cd".into()),
            |t| t.lines.insert(0, "RANGE 33 1 cd".into()),
            |t| t.lines.retain(|line| !line.starts_with("FIO")),
            |t| t.lines.insert(0, "DISCARD none".into()),
            |t| drop(t.lines.pop()),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let (cell, mut seen) = good();
            change(&mut seen);
            // The last line of its kind counts.
            seen.lines.rotate_left(if number == 6 { 1 } else { 0 });
            assert!(cell.check(&seen, &[]).is_err(), "change {number}");
        }
    }

    #[test]
    fn a_crash_must_leave_nothing() {
        let mut seen = Transcript::default();
        seen.take_report("MAPPED 40");
        seen.take_report("LEFT 0 0");
        check_crash(&seen).unwrap();
        seen.reports[1] = "LEFT 0 1".into();
        assert!(check_crash(&seen).is_err());
        seen.reports = vec!["MAPPED 2".into(), "LEFT 0 0".into()];
        assert!(check_crash(&seen).is_err());
    }
}
