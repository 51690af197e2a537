//! What must be true after a cell.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::columns::Back;
use crate::guests::image::{Entry, compare};
use crate::guests::transcript::{Transcript, value};

/// Files that a Linux guest writes: fewer means that something was not written at all.
const FILES: usize = 34;

/// How often a backend must have died before its guest's history says anything of that.
const DEATHS: u64 = 4;

/// Pages of any guest that dom0 has mapped: XenStore's and the console's.
const OWN_PAGES: u64 = 2;

/// What a Linux guest has on its disk is what dom0 finds there. Returns how many bytes were compared.
pub fn linux(seen: &Transcript) -> Result<u64> {
    seen.check_end()?;
    let tree: Vec<Entry> = seen.after("FILE ").filter_map(Entry::parse).collect();
    ensure!(tree.len() >= FILES, "the guest wrote {} files, not {FILES}", tree.len());
    let other: Vec<Entry> = found(seen, "FOUND FILE ").filter_map(Entry::parse).collect();
    compare(&tree, &other).context("dom0's view of the file system (as `the guest`)")?;

    let there = ranges(found(seen, "FOUND RANGE "))?;
    let said = ranges(seen.after("RANGE "))?;
    ensure!(!said.is_empty(), "the guest did not tell what is on its disk");
    for (range, digest) in &said {
        match there.get(range) {
            Some(same) if same == digest => {}
            Some(_) => bail!("RANGE {range}: dom0 finds something else there"),
            None => bail!("RANGE {range}: dom0 did not look"),
        }
    }
    let load: u64 = last(seen, "LOAD ")?.trim().parse().context("LOAD")?;
    ensure!(load > 0, "nothing was written under load");
    let mib: u64 =
        said.keys().filter_map(|range| range.split_once(' ')?.1.parse::<u64>().ok()).sum();
    Ok(tree.iter().map(|file| file.size).sum::<u64>() + (load << 10) + (mib << 20))
}

/// What only a guest does that does everything.
pub fn whole_program(seen: &Transcript, back: Back) -> Result<()> {
    let ranges = ranges(seen.after("RANGE "))?;
    ensure!(ranges.len() >= 3, "the guest told {} ranges only", ranges.len());
    let flushes: u64 = last(seen, "FLUSHES ")?.trim().parse().context("FLUSHES")?;
    if value(last(seen, "NEGOTIATED ")?, "cache") == Some("write-back") {
        ensure!(flushes > 0, "the disk offers flushes, and none was sent");
    }
    match (back.discards(), last(seen, "DISCARD ")?) {
        (true, "zeroes") | (false, "none") => Ok(()),
        (promised, came) => bail!("it has discard: {promised}; what came of it: {came}"),
    }
}

/// The disk grew under load, and what is new was used.
pub fn grown(seen: &Transcript, mib: u64) -> Result<()> {
    let grown = format!("GROWN {mib}");
    let place = |prefix: &str| seen.lines.iter().position(|line| line.starts_with(prefix));
    let load = place("LOAD ").context("the load did not end")?;
    let at = place(&grown).context("the guest did not see its disk grow")?;
    ensure!(at < load, "the disk grew only after the load had ended");
    let end = format!("{} 1", mib - 1);
    let used = ranges(seen.after("RANGE "))?.contains_key(end.as_str());
    ensure!(used, "the guest did not use what is new");
    Ok(())
}

/// It was negotiated that no grants are kept.
pub fn kept_no_grants(seen: &Transcript) -> Result<()> {
    let negotiated = last(seen, "NEGOTIATED ")?;
    ensure!(value(negotiated, "persistent") == Some("0"), "grants are kept: {negotiated}");
    Ok(())
}

/// The guest's requests had that layout, as XenStore has it.
pub fn spoke(seen: &Transcript, wanted: &str) -> Result<()> {
    let protocol = report(seen, "PROTOCOL ")?;
    ensure!(protocol == wanted, "it spoke {protocol}, not {wanted}");
    Ok(())
}

/// The guest found in each answer what its disk may hold, and no request failed. Returns how many bytes
/// were compared.
pub fn history(seen: &Transcript, requests: u64) -> Result<u64> {
    if let Some(wrong) = seen.after("HISTORY wrong: ").next() {
        bail!("{wrong}{}", seen.last_words());
    }
    seen.check_end()?;
    ensure!(of_history(seen, "requests")? >= requests, "not all requests were made");
    ensure!(of_history(seen, "failed")? == 0, "requests failed{}", seen.last_words());
    of_history(seen, "compared")
}

/// What the guest depends on died many times while it worked.
pub fn deaths(seen: &Transcript) -> Result<()> {
    let deaths: u64 = report(seen, "DEATHS ")?.parse().context("DEATHS")?;
    ensure!(deaths >= DEATHS, "{deaths} deaths are too few to say anything");
    Ok(())
}

/// Requests were in progress on the rings that were replaced.
pub fn forgotten(seen: &Transcript) -> Result<()> {
    ensure!(
        of_history(seen, "forgotten")? > 0,
        "nothing was in progress on a ring that was replaced"
    );
    Ok(())
}

/// The guest was offered discards, and its device got them; that has no command to write zeroes.
pub fn discarded(seen: &Transcript) -> Result<()> {
    let offered = value(last(seen, "NEGOTIATED ")?, "discard");
    ensure!(offered.is_some_and(|most| most != "0"), "no discard is offered: {offered:?}");
    let device = report(seen, "DEVICE ")?;
    ensure!(value(device, "write-zeroes") == Some("0"), "it can write zeroes: {device}");
    let discards: u64 =
        value(device, "discards").and_then(|count| count.parse().ok()).context("DEVICE")?;
    ensure!(discards > 0, "no discard reached the device: {device}");
    Ok(())
}

/// A number of a history's summary.
fn of_history(seen: &Transcript, key: &str) -> Result<u64> {
    let end = last(seen, "HISTORY end ")?;
    value(end, key).and_then(|count| count.parse().ok()).with_context(|| format!("no {key}: {end}"))
}

/// The destroyed guest had pages mapped, and all of them came back.
pub fn crash(seen: &Transcript) -> Result<()> {
    let mapped: u64 = report(seen, "MAPPED ")?.parse().context("MAPPED")?;
    ensure!(mapped > OWN_PAGES, "the guest's disk was not mapped when the guest was destroyed");
    nothing_left(seen)
}

/// Each time that the hostile guest broke the rules its backend closed that disk and said so, and kept
/// nothing; the guest's disk was as good as new in the end, and the one beside it worked all the while.
pub fn hostile(seen: &Transcript, guest: &str) -> Result<()> {
    let verdicts = seen.after("VERDICT PASS").count();
    ensure!(verdicts == 2, "{verdicts} of two guests passed{}", seen.last_words());
    ensure!(report(seen, "BESIDE ")? == "poweroff", "the guest beside it did not end well");
    report(seen, "MEANWHILE ").context("the hostile guest took longer than the one beside it")?;

    let domain = report(seen, "HOSTILE ")?;
    let rounds: Vec<_> = seen.after("HOSTILE ").collect();
    ensure!(!rounds.is_empty(), "the hostile guest broke no rule");
    for round in &rounds {
        // Both: what is refused at once goes no further than the first check.
        let some = |key| value(round, key).is_some_and(|count| count != "0");
        ensure!(some("done") && some("failed"), "the requests were all of a kind: {round}");
    }
    // `pvblkd` knows the guest's name, the driver domain its number.
    let disk = [format!("{guest} xvdb: queue 0: "), format!("xvdb of domain {domain}: ")];
    let closed = |line: &&String| {
        disk.iter().any(|disk| line.contains(disk)) && line.contains("more requests than the ring")
    };
    let times = seen.reports.iter().filter(closed).count();
    let wanted = rounds.len();
    ensure!(times == wanted, "{wanted} rings were to be closed, the backend tells of {times}");

    let (said, found) = (ranges(seen.after("RANGE "))?, found(seen, "FOUND RANGE "));
    ensure!(
        !said.is_empty() && ranges(found)? == said,
        "the hostile guest's disk holds other data"
    );
    nothing_left(seen)
}

/// No grants of a destroyed guest are mapped, and so it is gone.
fn nothing_left(seen: &Transcript) -> Result<()> {
    match report(seen, "LEFT ")? {
        "0 0" => Ok(()),
        left => bail!("grants still mapped, domains that cannot go: {left}"),
    }
}

fn report<'a>(seen: &'a Transcript, prefix: &'a str) -> Result<&'a str> {
    found(seen, prefix).next().with_context(|| format!("dom0 did not report {prefix}"))
}

fn found<'a>(seen: &'a Transcript, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    seen.reports.iter().filter_map(move |line| line.strip_prefix(prefix))
}

fn last<'a>(seen: &'a Transcript, prefix: &'a str) -> Result<&'a str> {
    seen.after(prefix).last().with_context(|| format!("the guest did not say {prefix}"))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Transcript {
        let digest = "ab".repeat(32);
        let mut seen = Transcript::default();
        let mut both = Vec::new();
        both.extend((0..FILES).map(|number| format!("FILE {digest} 7 /file {number}")));
        both.extend([33, 54, 60].map(|offset| format!("RANGE {offset} 1 {digest}")));
        for line in both {
            seen.take_report(&format!("FOUND {line}"));
            seen.lines.push(line);
        }
        for line in ["NEGOTIATED device=xvdb cache=write-back", "LOAD 9", "FLUSHES 1"] {
            seen.lines.push(line.into());
        }
        seen.lines.extend(["DISCARD zeroes".into(), "VERDICT PASS".into()]);
        seen.take_report("ENDED poweroff");
        seen
    }

    fn check(seen: &Transcript) -> Result<u64> {
        let bytes = linux(seen)?;
        whole_program(seen, Back::Linux)?;
        Ok(bytes)
    }

    #[test]
    fn a_good_run_passes() {
        let bytes = FILES as u64 * 7 + (9 << 10) + (3 << 20);
        assert_eq!(check(&good()).unwrap(), bytes);
    }

    #[test]
    fn each_missing_or_wrong_line_fails() {
        type Change = fn(&mut Transcript);
        let changes: [Change; 10] = [
            |t| drop(t.lines.remove(0)),
            |t| drop(t.reports.remove(0)),
            |t| drop(t.reports.pop()),
            |t| t.reports.push("FOUND RANGE 33 1 cd".into()),
            |t| t.lines.insert(0, "RANGE 33 1 cd".into()),
            |t| t.lines.retain(|line| !line.starts_with("LOAD")),
            |t| t.lines.insert(0, "DISCARD none".into()),
            |t| drop(t.lines.pop()),
            |t| t.lines.retain(|line| !line.starts_with("RANGE")),
            |t| t.lines.retain(|line| !line.starts_with("FLUSHES")),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut seen = good();
            change(&mut seen);
            // The last line of its kind counts.
            seen.lines.rotate_left(if number == 6 { 1 } else { 0 });
            assert!(check(&seen).is_err(), "change {number}");
        }
    }

    #[test]
    fn a_disk_must_grow_under_load() {
        let lines = ["GROWN 96", "RANGE 95 1 ab", "LOAD 9"];
        let seen = |lines: &[&str]| Transcript {
            lines: lines.iter().map(|&line| line.to_owned()).collect(),
            ..Transcript::default()
        };
        grown(&seen(&lines), 96).unwrap();
        for missing in 0..lines.len() {
            let mut less = lines.to_vec();
            less.remove(missing);
            assert!(grown(&seen(&less), 96).is_err());
        }
        assert!(grown(&seen(&["LOAD 9", "GROWN 96", "RANGE 95 1 ab"]), 96).is_err());
        assert!(grown(&seen(&["GROWN 64", "RANGE 95 1 ab", "LOAD 9"]), 96).is_err());
    }

    #[test]
    fn kept_grants_are_seen() {
        let mut seen = Transcript::default();
        assert!(kept_no_grants(&seen).is_err());
        seen.lines.push("NEGOTIATED device=xvdb persistent=0".into());
        kept_no_grants(&seen).unwrap();
        seen.lines.push("NEGOTIATED device=xvdb persistent=1".into());
        assert!(kept_no_grants(&seen).is_err());
    }

    #[test]
    fn another_layout_is_seen() {
        let mut seen = Transcript::default();
        assert!(spoke(&seen, "x86_32-abi").is_err());
        seen.take_report("PROTOCOL x86_32-abi");
        spoke(&seen, "x86_32-abi").unwrap();
        assert!(spoke(&seen, "x86_64-abi").is_err());
    }

    #[test]
    fn a_history_must_be_right_and_whole() {
        let end = "HISTORY end requests=100 failed=0 compared=512";
        let seen = |lines: &[&str], reports: &[&str]| {
            let mut seen = Transcript::default();
            seen.lines.extend(lines.iter().map(|&line| line.to_owned()));
            reports.iter().for_each(|report| seen.take_report(report));
            deaths(&seen)?;
            history(&seen, 100)
        };
        let reports = ["DEATHS 4", "ENDED poweroff"];
        assert_eq!(seen(&[end, "VERDICT PASS"], &reports).unwrap(), 512);
        for lines in [
            &["VERDICT PASS"][..],
            &[end],
            &["HISTORY wrong: an old write", end, "VERDICT PASS"],
            &["HISTORY end requests=99 failed=0 compared=512", "VERDICT PASS"],
            &["HISTORY end requests=100 failed=1 compared=512", "VERDICT PASS"],
            &["HISTORY end requests=100 compared=512", "VERDICT PASS"],
        ] {
            assert!(seen(lines, &reports).is_err(), "{lines:?}");
        }
        for reports in [&["ENDED poweroff"][..], &["DEATHS 3", "ENDED poweroff"], &["DEATHS 4"]] {
            assert!(seen(&[end, "VERDICT PASS"], reports).is_err(), "{reports:?}");
        }
    }

    #[test]
    fn a_crash_must_leave_nothing() {
        let mut seen = Transcript::default();
        seen.take_report("MAPPED 40");
        seen.take_report("LEFT 0 0");
        crash(&seen).unwrap();
        seen.reports[1] = "LEFT 0 1".into();
        assert!(crash(&seen).is_err());
        seen.reports = vec!["MAPPED 2".into(), "LEFT 0 0".into()];
        assert!(crash(&seen).is_err());
    }

    #[test]
    fn a_hostile_guest_must_lose_its_ring_and_nothing_else() {
        let log = "pvblkd: web xvdb: queue 0: the peer claims more requests than the ring holds";
        let (lines, reports) = (
            ["HOSTILE last done=1 failed=1", "RANGE 0 1 ab", "VERDICT PASS", "VERDICT PASS"],
            ["HOSTILE 4", "MEANWHILE", "LEFT 0 0", "BESIDE poweroff", "FOUND RANGE 0 1 ab", log],
        );
        let reports = reports.map(|report| report.replace("MEANWHILE", "MEANWHILE it worked"));
        let seen = |lines: &[&str], reports: &[String]| Transcript {
            lines: lines.iter().map(|&line| line.to_owned()).collect(),
            reports: reports.to_vec(),
            ..Transcript::default()
        };
        hostile(&seen(&lines, &reports), "web").unwrap();
        for missing in 0..lines.len() {
            let mut less = lines.to_vec();
            less.remove(missing);
            assert!(hostile(&seen(&less, &reports), "web").is_err(), "without {}", lines[missing]);
        }
        for missing in 0..reports.len() {
            let mut less = reports.to_vec();
            less.remove(missing);
            assert!(hostile(&seen(&lines, &less), "web").is_err(), "without {}", reports[missing]);
        }
        for count in ["done=0 failed=1", "done=1 failed=0"] {
            let round = format!("HOSTILE last {count}");
            let other = [&round, lines[1], lines[2], lines[3]];
            assert!(hostile(&seen(&other, &reports), "web").is_err(), "{count}");
        }
        for (old, new) in
            [("web xvdb", "mail xvdb"), ("1 ab", "1 cd"), ("0 0", "1 0"), ("poweroff", "crash")]
        {
            let other: Vec<_> = reports.iter().map(|report| report.replace(old, new)).collect();
            assert!(hostile(&seen(&lines, &other), "web").is_err(), "{new} in the place of {old}");
        }
    }

    #[test]
    fn a_ring_that_is_replaced_must_have_had_requests() {
        for (count, is_good) in [(0, false), (3, true)] {
            let mut seen = Transcript::default();
            seen.lines.push(format!("HISTORY end requests=9 forgotten={count}"));
            assert_eq!(forgotten(&seen).is_ok(), is_good);
        }
    }

    #[test]
    fn discards_must_reach_a_device_without_write_zeroes() {
        let seen = |most: u32, device: &str| {
            let mut seen = Transcript::default();
            seen.lines.push(format!("NEGOTIATED device=xvdb discard={most}"));
            seen.take_report(device);
            discarded(&seen)
        };
        let good = "DEVICE write-zeroes=0 discards=31";
        seen(1 << 20, good).unwrap();
        assert!(seen(0, good).is_err());
        for wrong in
            ["DEVICE write-zeroes=0 discards=0", "DEVICE write-zeroes=4096 discards=31", ""]
        {
            assert!(seen(1 << 20, wrong).is_err());
        }
    }
}
