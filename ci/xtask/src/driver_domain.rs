//! Our driver domain on real Xen, with several guests at a time: `examples/driver-domain`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bare;
use crate::guests;
use crate::guests::image::{Entry, Image, compare};
use crate::guests::transcript::{Transcript, value};
use crate::project;
use crate::report::say;
use crate::rig::{Boot, Event, Rig};

/// What the driver domain offers, and what it may take.
const STORAGE: &str = "name=\"storage\"\ntype=\"pvh\"\nkernel=\"/guests/driver-domain\"\n\
    cmdline=\"ram1=64m ram2=512m segments=4096 kept=140000 queues=2\"\nmemory=900\nvcpus=1\n\
    tsc_mode=\"native\"\ndriver_domain=1\n\
    disk=[\"phy:/dev/loop0,xvdb,r\", \"phy:/dev/loop1,xvdc,w\"]\n\
    on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n";

/// 512 MiB on one ring page.
const OUTSTANDING: u64 = 512 << 20;

/// Guests, and what else is in their configurations.
const GUESTS: [(&str, &str); 6] = [
    ("forwarded", "kernel=\"/guests/unikernel\"\nmemory=256\n"),
    ("linux", LINUX),
    ("crash", LINUX_WRITES),
    // The hypervisor copies for this one, several queues at a time.
    (
        "beside",
        "kernel=\"/guests/unikernel\"\ncmdline=\"persistent=0 queues=2 order=3\"\nmemory=256\n",
    ),
    ("after", "kernel=\"/guests/unikernel\"\nmemory=256\n"),
    (
        "big",
        "kernel=\"/guests/unikernel\"\ncmdline=\"big=xvda\"\nmemory=600\nmax_grant_frames=512\n",
    ),
];

const LINUX: &str = "kernel=\"/guests/vmlinux\"\nramdisk=\"/guests/cell.cpio\"\n\
    cmdline=\"console=hvc0 loglevel=1 pci=off cryptomgr.notests\"\nmemory=512\n";
const LINUX_WRITES: &str = "kernel=\"/guests/vmlinux\"\nramdisk=\"/guests/cell.cpio\"\n\
    cmdline=\"console=hvc0 loglevel=1 pci=off cryptomgr.notests task=write\"\nmemory=512\n";

/// What `driver-domain.sh` does, step by step.
const STEPS: [&str; 5] = ["together", "crash_beside", "big", "attach_own", "detach_own"];

/// All that was said, by whom.
#[derive(Default)]
struct Seen {
    guests: BTreeMap<String, Transcript>,
    /// What the guest beside the destroyed one had said when that was gone.
    beside: Vec<String>,
    /// Sums of what was written to a disk that came late, and of what dom0 found there.
    attached: Option<String>,
    /// What libxl did not like.
    errors: Vec<String>,
    /// How many domains are left at the end, dom0 included.
    domains: Option<String>,
}

impl Seen {
    fn take(&mut self, text: &str) {
        if let Some((name, line)) = text.strip_prefix("CONSOLE ").and_then(|r| r.split_once('|')) {
            self.guest(name).lines.push(line.trim_end().to_owned());
        } else if let Some((name, how)) = words(text, "ENDED ") {
            self.guest(name).take_report(&format!("ENDED {how}"));
        } else if let Some((name, found)) = words(text, "DISK ") {
            self.guest(name).take_report(&format!("DISK {found}"));
        } else if text.starts_with("FOUND ") {
            self.guest("linux").take_report(text);
        } else if text.starts_with("MAPPED ") || text.starts_with("LEFT ") {
            self.guest("crash").take_report(text);
        } else if text.starts_with("DESTROYED ") {
            self.beside = self.guest("beside").lines.clone();
        } else if let Some(sums) = text.strip_prefix("ATTACHED ") {
            self.attached = Some(sums.to_owned());
        } else if text.contains("libxl: error: ") {
            self.errors.push(text.to_owned());
        } else if let Some(count) = text.strip_prefix("DOMAINS ") {
            self.domains = Some(count.trim().to_owned());
        }
    }

    fn guest(&mut self, name: &str) -> &mut Transcript {
        self.guests.entry(name.to_owned()).or_default()
    }

    fn of(&self, name: &str) -> Result<&Transcript> {
        self.guests.get(name).with_context(|| format!("the guest {name} was not created"))
    }
}

fn words<'a>(text: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    text.strip_prefix(prefix)?.split_once(' ')
}

/// Boots Xen with the driver domain and its guests. `live` shows their consoles as they come.
pub fn run(rig: &Rig, live: bool) -> Result<()> {
    let image = Image::prepare(rig)?;
    let (kernel, initramfs) = rig.cell_guest(&guests::programs(rig)?)?;
    let scripts = project::rig_scripts().join("scenarios");
    let mut files = vec![
        ("guests/storage.cfg".into(), STORAGE.as_bytes().to_vec()),
        ("guests/steps".into(), STEPS.join("\n").into_bytes()),
    ];
    for (name, own) in GUESTS {
        let configuration = format!(
            "name=\"{name}\"\ntype=\"pvh\"\nvcpus=1\ntsc_mode=\"native\"\n\
             on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n{own}"
        );
        files.push((format!("guests/{name}.xl"), configuration.into_bytes()));
    }
    let boot = Boot {
        name: "driver-domain",
        scenario: "driver-domain",
        files,
        copies: vec![
            ("matrix.sh".into(), scripts.join("matrix.sh")),
            ("guests/driver-domain".into(), bare::build(bare::X86_64, "driver-domain", &[])?),
            ("guests/unikernel".into(), bare::build(bare::X86_64, "unikernel", &[])?),
            ("guests/ext4.img".into(), image.file.clone()),
            ("guests/vmlinux".into(), kernel),
            ("guests/cell.cpio".into(), initramfs),
        ],
        memory: 5120,
        // A guest may have as large a table as its configuration says, up to this.
        xen_arguments: "gnttab_max_frames=512",
        timeout: Duration::from_secs(1500),
        ..Boot::default()
    };
    say("booting Xen with Linux as dom0, a driver domain, and guests on that");
    let mut seen = Seen::default();
    let outcome = boot.run(rig, |event| {
        let Event::Report(text) = event else { return };
        match text.strip_prefix("CONSOLE ").and_then(|rest| rest.split_once('|')) {
            Some((name, line)) if live => println!("{name:>9}| {line}"),
            None if live || text.contains("xl:") => say(text),
            _ => {}
        }
        seen.take(text);
    })?;
    say(format!("driver domain: the machine ran for {:.1} s", outcome.seconds));
    let checked = check(&seen, &image.entries);
    if checked.is_err() {
        outcome.debug_port().iter().for_each(say);
    }
    checked?;
    outcome.check()
}

/// Everything that must hold.
fn check(seen: &Seen, files: &[Entry]) -> Result<()> {
    for name in ["forwarded", "after"] {
        seen.of(name)?.check_work(files).with_context(|| name.to_owned())?;
    }
    // Its disk is gone with it.
    seen.of("beside")?.check_end().context("the guest beside the one that was destroyed")?;
    ensure!(seen.errors.is_empty(), "libxl: {:?}", seen.errors);
    let was_at_work = seen.beside.iter().any(|line| line.starts_with("NEGOTIATED "))
        && !seen.beside.iter().any(|line| line.starts_with("VERDICT "));
    ensure!(was_at_work, "no other guest was at work when one was destroyed");
    check_linux(seen.of("linux")?).context("linux")?;
    check_crash(seen.of("crash")?)?;
    check_big(seen.of("big")?).context("big")?;
    check_attached(seen.attached.as_deref())?;
    check_storage(&seen.of("storage")?.lines).context("storage")?;
    ensure!(seen.domains.as_deref() == Some("1"), "domains are left: {:?}", seen.domains);
    Ok(())
}

/// The driver domain kept nothing, saw all that was outstanding, and ended when it was asked to.
fn check_storage(lines: &[String]) -> Result<()> {
    let left = |line: &&String| line.contains(" still mapped") && !line.contains(" 0 still mapped");
    if let Some(line) = lines.iter().find(left) {
        bail!("it kept something: {line}");
    }
    let place = |words: &str| {
        let place = lines.iter().position(|line| line.contains(words));
        place.with_context(|| format!("it did not say {words:?}"))
    };
    // All of it was mapped at once; what is done in one round of work is bounded.
    let unmapped = lines.iter().filter_map(|line| line.split_once(" pages of it unmapped"));
    let pages = unmapped.filter_map(|(start, _)| start.rsplit(' ').next()?.parse::<u64>().ok());
    let most = pages.max().unwrap_or(0);
    ensure!(most > OUTSTANDING / 4096, "{most} pages were mapped at once, at the most");
    place("own xvdd (16 MiB): closed")?;
    let (taken, asked) = (place("own xvdc (64 MiB): closed")?, place("asked to end: PowerOff")?);
    ensure!(taken < asked, "xvdc was closed only when the domain ended");
    place("own xvdb (24 MiB, read-only): closed").map(drop)
}

/// What was written through the driver domain, to a disk that it got late, is what dom0 finds there.
fn check_attached(sums: Option<&str>) -> Result<()> {
    let sums: Vec<_> = sums.context("no disk came late")?.split_whitespace().collect();
    // Each with a dash behind it, for the name of the file.
    ensure!(sums.len() == 4 && sums[0] == sums[2], "on the disk that came late: {sums:?}");
    Ok(())
}

/// What the guest wrote is what dom0 finds.
fn check_linux(guest: &Transcript) -> Result<()> {
    guest.check_end()?;
    let found = |prefix: &'static str| {
        guest.reports.iter().filter_map(move |line| line.strip_prefix(prefix))
    };
    let tree: Vec<Entry> = guest.after("FILE ").filter_map(Entry::parse).collect();
    ensure!(tree.len() > 30, "it wrote {} files only", tree.len());
    compare(&tree, &found("FOUND FILE ").filter_map(Entry::parse).collect::<Vec<_>>())?;
    let ranges: Vec<_> = found("FOUND RANGE ").collect();
    for range in guest.after("RANGE ") {
        ensure!(ranges.contains(&range.trim()), "RANGE {range}: dom0 finds {ranges:?}");
    }
    ensure!(guest.after("DISCARD ").any(|what| what == "zeroes"), "no discard");
    Ok(())
}

/// The destroyed guest had pages mapped, and all of them came back.
fn check_crash(guest: &Transcript) -> Result<()> {
    let report = |prefix: &str| {
        let line = guest.reports.iter().find_map(|line| line.strip_prefix(prefix));
        line.with_context(|| format!("dom0 did not report {prefix}"))
    };
    let mapped: u64 = report("MAPPED ")?.parse().context("MAPPED")?;
    ensure!(mapped > 0, "nothing was mapped when the guest was destroyed: it was not writing");
    ensure!(report("LEFT ")? == "0 0", "left after the crash: {}", report("LEFT ")?);
    Ok(())
}

/// As many bytes as there are slots of 16 MiB were under way at once, and came back as they were.
fn check_big(guest: &Transcript) -> Result<()> {
    guest.check_end()?;
    for which in ["BIG write ", "BIG read "] {
        let all: Vec<_> = guest.after(which).collect();
        let [said] = all[..] else { bail!("{which}: {} times", all.len()) };
        let outstanding = value(said, "outstanding").and_then(|bytes| bytes.parse().ok());
        ensure!(outstanding == Some(OUTSTANDING), "{said}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage() -> Vec<String> {
        let lines = [
            "xvda of domain 6: 9 pages of it unmapped, 0 still mapped",
            "xvda of domain 7: 131329 pages of it unmapped, 0 still mapped",
            "own xvdd (16 MiB): closed",
            "own xvdc (64 MiB): closed",
            "asked to end: PowerOff",
            "own xvdb (24 MiB, read-only): closed",
        ];
        lines.map(str::to_owned).to_vec()
    }

    #[test]
    fn the_driver_domain_must_keep_nothing_and_end() {
        check_storage(&storage()).unwrap();
        for missing in [1, 2, 3, 4, 5] {
            let mut lines = storage();
            lines.remove(missing);
            assert!(check_storage(&lines).is_err());
        }
        let mut lines = storage();
        lines[0] = "xvda of domain 6: 9 pages of it unmapped, 10 still mapped".into();
        assert!(check_storage(&lines).is_err());
        lines = storage();
        lines.swap(3, 4);
        assert!(check_storage(&lines).is_err());
    }

    #[test]
    fn lines_go_to_whom_they_belong() {
        let mut seen = Seen::default();
        for line in [
            "CONSOLE beside|NEGOTIATED device=xvdb",
            "MAPPED 40",
            "DESTROYED crash",
            "libxl: error: libxl_device.c:1181",
            "CONSOLE beside|VERDICT PASS",
            "LEFT 0 0",
            "ATTACHED ab - ab -",
            "ENDED beside poweroff",
            "DISK after ab 4096",
            "DOMAINS 1",
        ] {
            seen.take(line);
        }
        assert_eq!(seen.of("beside").unwrap().ended, "poweroff");
        assert_eq!(seen.of("after").unwrap().disk.as_deref(), Some("ab 4096"));
        assert_eq!(seen.domains.as_deref(), Some("1"));
        check_crash(seen.of("crash").unwrap()).unwrap();
        assert_eq!((seen.beside.len(), seen.errors.len()), (1, 1));
        assert!(seen.of("nobody").is_err());
        check_attached(seen.attached.as_deref()).unwrap();
        for wrong in [None, Some("ab - cd -"), Some("ab -"), Some("")] {
            assert!(check_attached(wrong).is_err());
        }
    }

    #[test]
    fn all_of_it_must_be_outstanding_at_once() {
        let mut guest = Transcript::default();
        for which in ["write", "read"] {
            guest.lines.push(format!("BIG {which} requests=32 outstanding=536870912"));
        }
        guest.lines.push("VERDICT PASS".into());
        guest.take_report("ENDED poweroff");
        check_big(&guest).unwrap();
        guest.lines[1] = "BIG read requests=31 outstanding=520093696".into();
        assert!(check_big(&guest).is_err());
    }
}
