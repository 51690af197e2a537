//! The bench `xen`: our guest and a Linux guest, one after the other, on the same backend and the
//! same RAM disk, in one boot under the deterministic clock.
//!
//! One instruction is one nanosecond there, whoever executes it, so that the figures are a property
//! of the code. Throughput is what each guest measures itself. Instructions a request, VM entries
//! and hypercalls are what QEMU's plugin `ci/rig/counters.c` counts: the difference between N and
//! 2N requests, so that what a run costs once drops out. The plugin also knows the virtual time
//! at which a marker is executed: dom0 executes one just before `xl create`, and a guest one when
//! it has its first block. Both ends of that are on one clock, whatever clocks the guests have.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::results::{self, Aim, Better, Row};
use super::{Options, fio, profile, text};
use crate::bare;
use crate::project;
use crate::report::say;
use crate::rig::{Boot, Event, Rig, stamp};
use crate::shell;

const NAME: &str = "xen";
const PEER: &str = "Linux xen-blkfront";

/// One access pattern.
struct Load {
    case: &'static str,
    pattern: &'static str,
    size: &'static str,
    depth: u32,
    /// Requests of the shorter of two runs.
    count: u32,
    unit: Unit,
    aim: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Requests,
    Mebibytes,
}

const LOADS: [Load; 4] = [
    Load {
        case: "4k-randread-qd32",
        pattern: "randread",
        size: "4k",
        depth: 32,
        count: 20_000,
        unit: Unit::Requests,
        aim: Some(2.5),
    },
    Load {
        case: "1m-read-qd4",
        pattern: "read",
        size: "1m",
        depth: 4,
        count: 400,
        unit: Unit::Mebibytes,
        aim: Some(1.4),
    },
    Load {
        case: "4k-randwrite-qd32",
        pattern: "randwrite",
        size: "4k",
        depth: 32,
        count: 20_000,
        unit: Unit::Requests,
        aim: Some(2.5),
    },
    Load {
        case: "4k-randread-qd1",
        pattern: "randread",
        size: "4k",
        depth: 1,
        count: 4_000,
        unit: Unit::Requests,
        aim: None,
    },
];

/// The most instructions that our guest may need for a random read of 4 KiB.
const GUEST_INSTRUCTIONS: f64 = 600.0;
/// The longest from `xl create` to the first block, in seconds.
const FIRST_READ: f64 = 0.4;

impl Load {
    /// The load as both guests understand it.
    fn words(&self, count: u32) -> String {
        format!("{}-{}-{}-{count}", self.pattern, self.size, self.depth)
    }

    /// The name of the guest of one kind that runs it.
    fn guest(&self, kind: &str) -> String {
        format!("{kind}-{}", self.case)
    }
}

/// One guest of the boot.
struct Guest {
    name: String,
    configuration: String,
}

/// What one guest's console said, and the markers of its time.
#[derive(Default)]
struct Run {
    lines: Vec<String>,
    ended: String,
    /// Executed by dom0 before the guest was created.
    start: Option<Mark>,
    marks: Vec<Mark>,
    /// How many markers other guests had executed before.
    marks_before: usize,
}

impl Run {
    fn check(&self, name: &str) -> Result<()> {
        let passed = self.lines.iter().any(|line| line == "VERDICT PASS");
        if !passed || self.ended != "poweroff" {
            let said = self.lines.join("\n");
            bail!("{name} ended by {}:\n{}", self.ended, shell::last_lines(&said, 20));
        }
        Ok(())
    }
}

/// A marker's counters.
type Mark = HashMap<String, u64>;

/// Runs the bench.
pub fn run(options: &Options) -> Result<()> {
    let wanted = |load: &&Load| options.load.as_ref().is_none_or(|name| name == load.case);
    let loads: Vec<&Load> = LOADS.iter().filter(wanted).collect();
    if loads.is_empty() {
        bail!("no such load; there are {}", LOADS.map(|load| load.case).join(", "));
    }
    let rig = Rig::prepare()?;
    let folder = rig.path("bench");
    fs::create_dir_all(&folder)?;
    let plugin = plugin(&folder)?;
    let mark = folder.join("mark");
    fs::write(&mark, marker_program())?;
    let image = bare::build(bare::X86_64, "unikernel", &[])?;

    let mut copies =
        vec![("bin/mark".into(), mark.clone()), ("guests/unikernel".into(), image.clone())];
    let mut guests = Vec::new();
    if !options.ours_only {
        let fio = fio::prepare(&rig)?;
        let (kernel, initramfs) = rig.bench_guest(&[("bin/fio", fio), ("bin/mark", mark)])?;
        copies.push(("guests/vmlinux".into(), kernel));
        copies.push(("guests/linux.cpio".into(), initramfs));
    }
    if options.load.is_none() {
        // The first guest of a boot takes longer to create: it is nobody's.
        guests.push(ours("warm-up", "bench=first-read"));
        if !options.ours_only {
            guests.push(linux("linux-first-read", 256, "task=first-read"));
        }
        guests.push(ours("ours-first-read", "bench=first-read"));
    }
    // A guest for each load: what one leaves mapped in the backend must not be the next one's lot.
    for load in &loads {
        let (short, long) = (load.words(load.count), load.words(2 * load.count));
        if !options.ours_only {
            let words = format!("clocksource=tsc task=fio case={short}");
            guests.push(linux(&load.guest("linux"), 2048, &words));
        }
        let words = format!("order=4 bench={short},{long} {}", options.cmdline);
        guests.push(ours(&load.guest("ours"), &words));
    }

    // Several may measure at once.
    let marks = folder.join(format!("marks-{}", std::process::id()));
    let blocks = folder.join(format!("profile-{}", std::process::id()));
    let runs = boot(&rig, &plugin, &marks, options.profile.then_some(&*blocks), copies, &guests)?;
    for Guest { name, .. } in &guests {
        runs.get(name).with_context(|| format!("{name} was not created"))?.check(name)?;
    }

    let mut rows = Vec::new();
    for load in loads {
        let mine = &runs[&load.guest("ours")];
        load_rows(load, mine, runs.get(&load.guest("linux")), &mut rows)?;
        if options.profile {
            // Of the longer run, whose end is the fourth marker.
            let requests = f64::from(2 * load.count);
            profile::print(&blocks, &image, load.case, mine.marks_before + 3, requests)?;
        }
    }
    if let Some(mine) = runs.get("ours-first-read") {
        rows.extend(first_read(mine, runs.get("linux-first-read")));
    }
    rows.push(code_size(&rig, &image)?);
    fs::remove_file(marks)?;
    if options.profile {
        say(format!("blocks of the guests by address: {}", blocks.display()));
    }
    println!();
    // Only a whole run is a result.
    let whole = options.load.is_none() && !options.ours_only && options.cmdline.is_empty();
    results::publish(if whole { NAME } else { "xen-part" }, &rows)
}

/// Builds QEMU's plugin.
fn plugin(folder: &Path) -> Result<PathBuf> {
    let source = project::rig_scripts().join("counters.c");
    let plugin = folder.join("counters.so");
    let key = fs::read_to_string(&source)?;
    stamp::once(&folder.join("plugin.stamp"), &key, "building QEMU's plugin", || {
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&plugin).arg(&source);
        shell::output(&mut gcc).map(drop).context("the plugin that counts needs gcc")
    })?;
    Ok(plugin)
}

/// A program for Linux that executes the marker and ends: an ELF file of one segment.
///
/// It writes to its own page first. So the emulator has to translate the marker anew each time,
/// which is when the plugin can read the clock.
fn marker_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let code = [
        &[0xc6, 0x05, 0x00, 0x00, 0x00, 0x00, 0x0f][..], // movb $0x0f, next(%rip)
        &[0x0f, 0x1f, 0x84, 0x00, b'p', b'v', b'b', b'k'], // next: the marker
        &[0xb8, 60, 0, 0, 0],                            // mov $60, %eax (exit)
        &[0x31, 0xff],                                   // xor %edi, %edi
        &[0x0f, 0x05],                                   // syscall
    ]
    .concat();
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let size = HEADERS + code.len() as u64;
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(u64::to_le_bytes(word)); // entry, program headers, section headers
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]); // to load; may be read, written and executed
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(u64::to_le_bytes(word)); // offset, address twice, sizes, alignment
    }
    file.extend(code);
    file
}

fn ours(name: &str, words: &str) -> Guest {
    let own = format!("kernel=\"/guests/unikernel\"\ncmdline=\"{words}\"\nmemory=256\n");
    Guest { name: name.to_owned(), configuration: configuration(name, &own) }
}

fn linux(name: &str, memory: u32, words: &str) -> Guest {
    let own = format!(
        "kernel=\"/guests/vmlinux\"\nramdisk=\"/guests/linux.cpio\"\n\
         cmdline=\"console=hvc0 quiet {words}\"\nmemory={memory}\n"
    );
    Guest { name: name.to_owned(), configuration: configuration(name, &own) }
}

fn configuration(name: &str, own: &str) -> String {
    format!(
        "name=\"{name}\"\ntype=\"pvh\"\nvcpus=1\n{own}tsc_mode=\"native\"\n\
         disk=[\"phy:/dev/ram0,xvda,w\"]\n\
         on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n"
    )
}

fn boot(
    rig: &Rig,
    plugin: &Path,
    marks: &Path,
    blocks: Option<&Path>,
    copies: Vec<(String, PathBuf)>,
    guests: &[Guest],
) -> Result<HashMap<String, Run>> {
    let mut files = Vec::new();
    let mut list = String::new();
    for Guest { name, configuration } in guests {
        files.push((format!("guests/{name}.cfg"), configuration.clone().into_bytes()));
        list.push_str(&format!("{name}\n"));
    }
    files.push(("guests/cases".into(), list.into_bytes()));
    let mut arguments = plugin.as_os_str().to_owned();
    arguments.push(",out=");
    arguments.push(marks);
    if let Some(blocks) = blocks {
        arguments.push(",profile=");
        arguments.push(blocks);
    }
    let boot = Boot {
        name: "bench",
        scenario: "bench",
        files,
        copies,
        memory: 6144,
        deterministic: true,
        // Xen scrubs free memory whenever it is idle, which would be counted.
        xen_arguments: "bootscrub=0",
        qemu_arguments: vec!["-plugin".into(), arguments],
        timeout: Duration::from_secs(1800),
        ..Boot::default()
    };
    say(format!("booting Xen under the deterministic clock; guests: {}", guests.len()));
    let mut runs = HashMap::<String, Run>::new();
    let mut order = Vec::new();
    let outcome = boot.run(rig, |event| match event {
        Event::Report(text) => {
            if let Some(name) = text.strip_prefix("CASE ") {
                say(format!("{name} ..."));
                order.push(name.to_owned());
                runs.insert(name.to_owned(), Run::default());
            } else if let (Some(how), Some(run)) =
                (text.strip_prefix("ENDED "), order.last().and_then(|name| runs.get_mut(name)))
            {
                how.clone_into(&mut run.ended);
            } else if text.contains("xl:") {
                say(text);
            }
        }
        Event::Guest(text) => {
            if let Some(run) = order.last().and_then(|name| runs.get_mut(name)) {
                run.lines.push(text.trim_end().to_owned());
            }
        }
        Event::Bytes(_) => {}
    })?;
    say(format!("the machine ran for {:.1} s", outcome.seconds));
    if outcome.reason.is_some()
        && let Some((name, run)) = order.last().and_then(|name| runs.get_key_value(name))
    {
        run.check(name)?;
    }
    outcome.check()?;
    assign_marks(&fs::read_to_string(marks)?, &order, &mut runs);
    Ok(runs)
}

/// A marker of dom0 begins a guest's time; the guest's own follow.
fn assign_marks(text: &str, order: &[String], runs: &mut HashMap<String, Run>) {
    let mut names = order.iter();
    let mut current: Option<&mut Run> = None;
    let mut before = 0;
    for line in text.lines().filter_map(|line| line.strip_prefix("MARK by=")) {
        let Some((who, words)) = line.split_once(' ') else { continue };
        let mark: Mark = words
            .split(' ')
            .filter_map(|word| word.split_once('='))
            .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
            .collect();
        if who.starts_with("dom0") {
            current = names.next().and_then(|name| runs.get_mut(name));
            if let Some(run) = &mut current {
                run.start = Some(mark);
                run.marks_before = before;
            }
        } else {
            before += 1;
            if let Some(run) = &mut current {
                run.marks.push(mark);
            }
        }
    }
}

/// The counters of one request: the difference between `(begin, end)` of a long and a short run.
fn slope(
    long: (&Mark, &Mark),
    short: (&Mark, &Mark),
    requests: u32,
) -> impl Fn(&[&str]) -> f64 + use<> {
    let counts: HashMap<String, f64> = long
        .0
        .keys()
        .map(|key| {
            let of = |mark: &Mark| mark.get(key).copied().unwrap_or(0) as f64;
            let more = (of(long.1) - of(long.0)) - (of(short.1) - of(short.0));
            (key.clone(), more / f64::from(requests))
        })
        .collect();
    move |keys| keys.iter().map(|key| counts.get(*key).copied().unwrap_or(f64::NAN)).sum()
}

/// What is compared a request: name, unit, counters of ours, counters of the peer.
type Part = (&'static str, &'static str, &'static [&'static str], &'static [&'static str]);

const GUEST: [&str; 2] = ["guest-kernel", "guest-user"];
const PARTS: [Part; 11] = [
    ("instructions", "instructions", &["all"], &["all"]),
    ("guest-instructions", "instructions", &GUEST, &GUEST),
    // Without the benchmark's program, which our guest has in its kernel.
    ("guest-kernel-instructions", "instructions", &GUEST, &["guest-kernel"]),
    (
        "dom0-instructions",
        "instructions",
        &["dom0-kernel", "dom0-user"],
        &["dom0-kernel", "dom0-user"],
    ),
    ("xen-instructions", "instructions", &["xen"], &["xen"]),
    ("guest-copies", "string steps", &["guest-copies"], &["guest-copies"]),
    ("dom0-copies", "string steps", &["dom0-copies"], &["dom0-copies"]),
    ("vm-entries", "VM entries", &["vmrun"], &["vmrun"]),
    ("guest-hypercalls", "hypercalls", &["vmmcall"], &["vmmcall"]),
    ("dom0-hypercalls", "hypercalls", &["dom0-hypercalls"], &["dom0-hypercalls"]),
    ("guest-system-calls", "system calls", &["guest-syscalls"], &["guest-syscalls"]),
];

fn load_rows(load: &Load, mine: &Run, peer: Option<&Run>, rows: &mut Vec<Row>) -> Result<()> {
    let said = mine
        .lines
        .iter()
        .find_map(|line| line.strip_prefix(&format!("BENCH {} ", load.words(2 * load.count))))
        .with_context(|| format!("our guest does not tell {}", load.case))?;
    let told = |key: &str| -> Result<f64> {
        said.split(' ')
            .filter_map(|word| word.split_once('='))
            .find(|word| word.0 == key)
            .and_then(|word| word.1.parse().ok())
            .with_context(|| format!("our guest does not tell {key} of {}", load.case))
    };
    let (unit, rate) = match load.unit {
        Unit::Requests => ("requests/s", told("iops")?),
        Unit::Mebibytes => ("MiB/s", told("mib")?),
    };
    let theirs = peer.map(|peer| fio_rate(load, peer)).transpose()?;
    let case = |part: &str| format!("front/{}{part}", load.case);
    let row = Row::new(NAME, case(""), unit, Better::Higher, rate, theirs.map(|rate| (rate, PEER)));
    rows.push(match load.aim {
        Some(times) => row.aim(Aim::Times(times)),
        None => row,
    });

    let [a, b, c, d] = &mine.marks[..] else { bail!("our guest did not execute its markers") };
    let ours = slope((c, d), (a, b), load.count);
    let theirs = match peer {
        None => None,
        Some(peer) => {
            let [a, b, c] = &peer.marks[..] else { bail!("the peer did not execute its markers") };
            Some(slope((b, c), (a, b), load.count))
        }
    };
    for (part, unit, mine, peers) in PARTS {
        let theirs = theirs.as_ref().map(|theirs| (theirs(peers), PEER));
        let case = case(&format!("/{part}"));
        let row = Row::new(NAME, case, unit, Better::Lower, ours(mine), theirs);
        let limited = part == "guest-instructions" && load.size == "4k" && load.depth > 1;
        rows.push(if limited { row.aim(Aim::AtMost(GUEST_INSTRUCTIONS)) } else { row });
    }
    // What only our own guest can tell.
    for (part, unit, key) in [
        ("notifications-sent", "notifications", "sent"),
        ("notifications-received", "notifications", "received"),
        ("grant-operations", "grants", "grants"),
    ] {
        let each = told(key)? / told("requests")?;
        rows.push(Row::new(NAME, case(&format!("/{part}")), unit, Better::Lower, each, None));
    }
    Ok(())
}

/// What fio measured, out of its terse format: fields 7 and 8 are the bandwidth in KiB/s and the
/// requests a second of reads, 48 and 49 of writes.
fn fio_rate(load: &Load, peer: &Run) -> Result<f64> {
    let line = peer
        .lines
        .iter()
        .find_map(|line| line.strip_prefix("FIO "))
        .with_context(|| format!("fio did not report {}", load.case))?;
    let fields: Vec<&str> = line.split(';').collect();
    let first = if load.pattern.ends_with("write") { 47 } else { 6 };
    let field = |at: usize| -> Result<f64> {
        let field = fields.get(at).and_then(|field| field.parse().ok());
        field.with_context(|| format!("cannot read fio's report: {line}"))
    };
    Ok(match load.unit {
        Unit::Requests => field(first + 1)?,
        Unit::Mebibytes => field(first)? / 1024.0,
    })
}

/// From just before `xl create` to the first block in the guest's memory.
fn first_read(mine: &Run, peer: Option<&Run>) -> Option<Row> {
    let seconds = |run: &Run| {
        let time = |mark: &Mark| mark.get("ns").copied().filter(|time| *time > 0);
        let (start, end) = (time(run.start.as_ref()?)?, time(run.marks.first()?)?);
        Some(end.checked_sub(start)? as f64 / 1e9)
    };
    let Some(ours) = seconds(mine) else {
        say("this QEMU does not export its clock: no time of the first read");
        return None;
    };
    let theirs = peer.and_then(seconds).map(|seconds| (seconds, PEER));
    let row = Row::new(NAME, "front/first-read".into(), "s", Better::Lower, ours, theirs);
    Some(row.aim(Aim::AtMost(FIRST_READ)))
}

/// Machine code of the driver in our image, beside that of Linux's module alone.
fn code_size(rig: &Rig, image: &Path) -> Result<Row> {
    let ours = text::of_driver(image)? as f64;
    let module = rig.packages().module("xen-blkfront")?;
    let theirs = text::of_object(&rig.packages().unpacked(&module)?)? as f64;
    let peer = Some((theirs, "xen-blkfront.ko without blk-mq, xenbus and grant tables"));
    Ok(Row::new(NAME, "front/text-bytes".into(), "bytes", Better::Lower, ours, peer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_markers_follow_dom0s() {
        let text = "MARK by=dom0-user ns=5 all=1\nMARK by=guest-user ns=7 all=2\n\
                    MARK by=dom0-user ns=9 all=3\nMARK by=guest-kernel ns=11 all=4\n";
        let order = ["a".to_owned(), "b".to_owned()];
        let mut runs: HashMap<String, Run> =
            order.iter().map(|name| (name.clone(), Run::default())).collect();
        assign_marks(text, &order, &mut runs);
        let b = &runs["b"];
        assert_eq!(b.start.as_ref().unwrap()["ns"], 9);
        assert_eq!((b.marks.len(), b.marks[0]["all"], b.marks_before), (1, 4, 1));
        assert_eq!(first_read(&runs["a"], Some(b)).unwrap().ours, 2e-9);
    }

    #[test]
    fn what_a_run_costs_once_drops_out() {
        let mark = |all| Mark::from([("all".to_owned(), all)]);
        let (a, b, c) = (mark(0), mark(1_100), mark(3_200));
        let each = slope((&b, &c), (&a, &b), 100);
        assert_eq!(each(&["all"]), 10.0);
    }
}
