//! One boot under the deterministic clock: the guests that measure, and what comes of each.
//!
//! Throughput is what each guest measures itself. Instructions a request, VM entries and hypercalls
//! are what QEMU's plugin `ci/rig/counters.c` counts: the difference between N and 2N requests, so
//! that what a run costs once drops out. The plugin also knows the virtual time at which a marker
//! is executed: dom0 executes one just before `xl create`, and a guest one when it has its first
//! block. Both ends of that are on one clock, whatever clocks the guests have.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::bare;
use crate::bench::fio;
use crate::project;
use crate::report::say;
use crate::rig::{Boot, Event, Rig, stamp};
use crate::shell;

/// One access pattern.
pub(super) struct Load {
    pub case: &'static str,
    pub pattern: &'static str,
    pub size: &'static str,
    pub depth: u32,
    /// Requests of the shorter of two runs.
    pub count: u32,
    pub unit: Unit,
    pub aim: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Requests,
    Mebibytes,
}

pub(super) const LOADS: [Load; 4] = [
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

/// One guest of the boot.
pub(super) struct Guest {
    pub name: String,
    pub configuration: String,
    /// Which function of the scenario starts what serves it.
    pub backend: &'static str,
}

/// What serves a guest's disk: its name in the scenario, and the disk as xl's configuration has it.
#[derive(Clone, Copy)]
pub(super) struct Backend {
    pub name: &'static str,
    pub disk: &'static str,
}

/// Linux's own.
pub(super) const BLKBACK: Backend = Backend { name: "blkback", disk: "phy:/dev/ram0,xvda,w" };

/// What a boot needs beside the guests' configurations.
#[derive(Default)]
pub(super) struct Needs {
    /// Files that dom0 finds under the paths given.
    pub copies: Vec<(String, PathBuf)>,
    /// Archives of programs.
    pub overlays: Vec<PathBuf>,
}

/// What one guest's console said, and the markers of its time.
#[derive(Default)]
pub(super) struct Run {
    pub lines: Vec<String>,
    pub ended: String,
    /// Executed by dom0 before the guest was created.
    pub start: Option<Mark>,
    pub marks: Vec<Mark>,
    /// How many markers other guests had executed before.
    pub marks_before: usize,
    /// What `pvblkd` had in memory of its own meanwhile, in KiB.
    pub memory: Option<u64>,
}

impl Run {
    pub fn check(&self, name: &str) -> Result<()> {
        let passed = self.lines.iter().any(|line| line == "VERDICT PASS");
        if !passed || self.ended != "poweroff" {
            let said = self.lines.join("\n");
            bail!("{name} ended by {}:\n{}", self.ended, shell::last_lines(&said, 20));
        }
        Ok(())
    }
}

/// A marker's counters.
pub(super) type Mark = HashMap<String, u64>;

impl Load {
    /// The load as both guests understand it.
    pub fn words(&self, count: u32) -> String {
        format!("{}-{}-{}-{count}", self.pattern, self.size, self.depth)
    }

    /// The name of the guest of one kind that runs it.
    pub fn guest(&self, kind: &str) -> String {
        format!("{kind}-{}", self.case)
    }
}

/// Builds what guests and dom0 need to measure: QEMU's plugin, our image, and Linux with fio.
/// Returns the plugin, the image, and what dom0 is given.
pub(super) fn prepare(rig: &Rig, with_linux: bool) -> Result<(PathBuf, PathBuf, Needs)> {
    let folder = rig.path("bench");
    fs::create_dir_all(&folder)?;
    let plugin = plugin(&folder)?;
    let mark = folder.join("mark");
    fs::write(&mark, marker_program())?;
    let image = bare::build(bare::X86_64, "unikernel", &[])?;
    let mut copies =
        vec![("bin/mark".into(), mark.clone()), ("guests/unikernel".into(), image.clone())];
    if with_linux {
        let fio = fio::prepare(rig)?;
        let (kernel, initramfs) = rig.bench_guest(&[("bin/fio", fio), ("bin/mark", mark)])?;
        copies.push(("guests/vmlinux".into(), kernel));
        copies.push(("guests/linux.cpio".into(), initramfs));
    }
    Ok((plugin, image, Needs { copies, overlays: Vec::new() }))
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

pub(super) fn ours(name: &str, words: &str, backend: Backend) -> Guest {
    ours_with(name, words, backend.name, &[backend.disk])
}

/// Our guest with several disks, whose configuration is `disks`.
pub(super) fn ours_with(name: &str, words: &str, backend: &'static str, disks: &[&str]) -> Guest {
    let own = format!("kernel=\"/guests/unikernel\"\ncmdline=\"{words}\"\nmemory=256\n");
    guest(name, &own, backend, disks)
}

pub(super) fn linux(name: &str, memory: u32, words: &str, backend: Backend) -> Guest {
    let own = format!(
        "kernel=\"/guests/vmlinux\"\nramdisk=\"/guests/linux.cpio\"\n\
         cmdline=\"console=hvc0 quiet {words}\"\nmemory={memory}\n"
    );
    guest(name, &own, backend.name, &[backend.disk])
}

fn guest(name: &str, own: &str, backend: &'static str, disks: &[&str]) -> Guest {
    let disks: Vec<String> = disks.iter().map(|disk| format!("\"{disk}\"")).collect();
    let configuration = format!(
        "name=\"{name}\"\ntype=\"pvh\"\nvcpus=1\n{own}tsc_mode=\"native\"\n\
         disk=[{}]\n\
         on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n",
        disks.join(",")
    );
    Guest { name: name.to_owned(), configuration, backend }
}

pub(super) fn boot(
    rig: &Rig,
    plugin: &Path,
    marks: &Path,
    blocks: Option<&Path>,
    needs: Needs,
    guests: &[Guest],
) -> Result<HashMap<String, Run>> {
    let mut files = Vec::new();
    let mut list = String::new();
    for Guest { name, configuration, backend } in guests {
        files.push((format!("guests/{name}.cfg"), configuration.clone().into_bytes()));
        list.push_str(&format!("{name} {backend}\n"));
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
        copies: needs.copies,
        overlays: needs.overlays,
        memory: 6144,
        deterministic: true,
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
            } else if let (Some(memory), Some(run)) =
                (text.strip_prefix("MEMORY "), order.last().and_then(|name| runs.get_mut(name)))
            {
                run.memory = memory.parse().ok();
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
pub(super) fn assign_marks(text: &str, order: &[String], runs: &mut HashMap<String, Run>) {
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
pub(super) fn slope(
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

/// What fio measured, out of its terse format: fields 7 and 8 are the bandwidth in KiB/s and the
/// requests a second of reads, 48 and 49 of writes.
pub(super) fn fio_rate(load: &Load, peer: &Run) -> Result<f64> {
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
