//! A Linux guest on `vhost-user-blkd`, and on the export of QEMU's own `qemu-storage-daemon`: the
//! same file on a tmpfs, the same options, in turn in one boot.
//!
//! The guest is emulated, so that its own processor is the limit of most loads, and the machine may be
//! busy with other things. So the daemons take turns, a second each, in many rounds, and there are two
//! kinds of figures: what fio in the guest reaches, as the medians of the rounds, with the median of
//! what the two reached in the same round for a ratio; and what depends less on how fast the guest is:
//! the processor time of a request by the system's own account, that of the daemon and that of daemon
//! and machine together, and the interrupts that the guest counts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Options;
use super::fio;
use super::results::{self, Aim, Better, Row};
use crate::report::say;
use crate::rig::{Rig, stamp};
use crate::vhost_user::daemon::{self, Daemon, Plan};
use crate::vhost_user::machine::{Disk, Machine};

const NAME: &str = "vhost-user";

/// The peer's package.
const PACKAGE: &str = "qemu-utils";

/// The size of the disks.
const MIB: u64 = 128;

/// Rounds, and seconds of each load in each.
const ROUNDS: usize = 11;
const SECONDS: u32 = 1;

/// What fio does: pattern, block size, how many in flight; its name; and the unit of its rate.
const LOADS: [(&str, &str, Unit); 6] = [
    ("randread-4k-32", "4k-randread-qd32", Unit::Requests),
    ("randwrite-4k-32", "4k-randwrite-qd32", Unit::Requests),
    ("randread-4k-1", "4k-randread-qd1", Unit::Requests),
    ("randwrite-4k-1", "4k-randwrite-qd1", Unit::Requests),
    ("read-1m-4", "1m-read-qd4", Unit::Mebibytes),
    ("write-1m-4", "1m-write-qd4", Unit::Mebibytes),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Requests,
    Mebibytes,
}

/// The daemons, by what the guest calls their disks.
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
const FILE: usize = 0;
const MEMORY: usize = 1;
const PEER: usize = 2;

/// Runs the bench.
pub fn run(options: &Options) -> Result<()> {
    let wanted = |load: &&(&str, &str, Unit)| options.load.as_ref().is_none_or(|it| it == load.1);
    let loads: Vec<_> = LOADS.iter().filter(wanted).collect();
    ensure!(!loads.is_empty(), "no such load; there are {}", LOADS.map(|load| load.1).join(", "));
    let rig = Rig::prepare()?;
    rig.add(&[PACKAGE])?;
    let program = daemon::build()?;
    let files = rig.virtio_bench_guest(&fio::prepare(&rig)?)?;
    let folder = rig.path("bench/vhost-user");
    stamp::fresh(&folder)?;
    // On a tmpfs, whatever the folder is on.
    let memory = Memory::new()?;
    let image = memory.0.join("disk.img");
    File::create(&image)?.set_len(MIB << 20)?;

    let daemons = [
        ours(&program, &memory.0, &folder, "file", &["--buffered", "--file"], image.as_os_str())?,
        ours(&program, &memory.0, &folder, "memory", &["--memory"], format!("{MIB}M").as_ref())?,
        peer(&rig, &memory.0, &folder, &image)?,
    ];
    let sockets: Vec<PathBuf> = daemons.iter().map(|daemon| daemon.socket().to_owned()).collect();
    let names: Vec<&str> = loads.iter().map(|load| load.0).collect();
    let arguments = format!(
        "disks={} cases={} rounds={ROUNDS} seconds={SECONDS}",
        DISKS.join(","),
        names.join(",")
    );
    let machine = Machine {
        files,
        disks: sockets.iter().map(|socket| Disk { socket, queues: 1, packed: false }).collect(),
        arguments: &arguments,
        // The other processor is the daemon's.
        cpus: 1,
        folder: &folder,
        timeout: Duration::from_secs(1200),
    };
    let mut log = Log::default();
    machine.run(&rig, |qemu, line| line.map_or(Ok(()), |line| log.hear(line, qemu, &daemons)))?;
    ensure!(log.is_complete, "the guest did not come to its end: see {}", folder.display());
    for daemon in daemons {
        daemon.end()?;
    }
    let mut rows = Vec::new();
    for (case, name, unit) in &loads {
        rows_of(case, name, *unit, &log, &mut rows)?;
    }
    println!();
    say(format!(
        "medians of {ROUNDS} rounds of {SECONDS} s in turn, ratios within a round; the guest's emulated \
         processor limits both. /cpu: processor time that the daemon takes for a request; /cpu-all: \
         daemon and QEMU, guest included"
    ));
    results::publish(if options.load.is_none() { NAME } else { "vhost-user-part" }, &rows)
}

/// A folder in memory. It goes when this is dropped.
struct Memory(PathBuf);

impl Memory {
    fn new() -> Result<Self> {
        let folder = Path::new("/dev/shm").join(format!("pvblk-bench-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn ours(
    program: &Path,
    memory: &Path,
    folder: &Path,
    name: &str,
    words: &[&str],
    last: &std::ffi::OsStr,
) -> Result<Daemon> {
    let socket = memory.join(name);
    let (program, place) = (program.to_owned(), socket.clone());
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let last = last.to_owned();
    Daemon::start(Plan {
        command: Box::new(move || {
            let mut command = daemon::kept(&program);
            command.arg("--socket").arg(&place).args(["--queues", "1"]).args(&words).arg(&last);
            command
        }),
        socket,
        log: folder.join(format!("{name}.log")),
    })
}

/// The peer at its best: a thread of its own for the export, and `io_uring`.
fn peer(rig: &Rig, memory: &Path, folder: &Path, image: &Path) -> Result<Daemon> {
    let socket = memory.join("peer");
    let export = format!(
        "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=1,\
         iothread=t",
        socket.display()
    );
    let node = |aio: &str| {
        let image = image.display();
        format!("file,node-name=disk,filename={image},locking=off,discard=unmap,aio={aio}")
    };
    let plan = |aio: &str| {
        let base = rig.packages().command("usr/bin/qemu-storage-daemon");
        let program = base.get_program().to_owned();
        let words: Vec<_> = base.get_args().map(ToOwned::to_owned).collect();
        let (node, export) = (node(aio), export.clone());
        Plan {
            command: Box::new(move || {
                let mut command = daemon::kept(Path::new(&program));
                command.args(&words).args(["--object", "iothread,id=t"]);
                command.arg("--blockdev").arg(&node).arg("--export").arg(&export);
                command
            }),
            socket: socket.clone(),
            log: folder.join("qemu-storage-daemon.log"),
        }
    };
    // Where the system has none, it is the peer's threads that do it.
    Daemon::start(plan("io_uring")).or_else(|_| Daemon::start(plan("threads")))
}

/// What was measured in one run: the rate; for a request, nanoseconds of processors (of the daemon, of
/// everybody), and interrupts.
#[derive(Clone, Copy)]
struct Sample {
    rate: [f64; 2],
    cpu: [f64; 2],
    interrupts: f64,
}

/// What the guest has said.
#[derive(Default)]
struct Log {
    samples: BTreeMap<(String, usize), Vec<Sample>>,
    began: Option<[u64; 2]>,
    is_complete: bool,
}

impl Log {
    fn hear(&mut self, line: &str, qemu: u32, daemons: &[Daemon; 3]) -> Result<()> {
        let words: Vec<&str> = line.splitn(5, ' ').collect();
        let number = |disk: &str| DISKS.iter().position(|other| *other == disk);
        match words[..] {
            ["BEGIN", disk, _] => {
                let number = number(disk).context("a disk that there is not")?;
                self.began = Some(processor_times(qemu, &daemons[number])?);
            }
            ["END", disk, case, interrupts, report] => {
                let number = number(disk).context("a disk that there is not")?;
                let began = self.began.take().context("END without BEGIN")?;
                let ended = processor_times(qemu, &daemons[number])?;
                let took = [0, 1].map(|place| ended[place].saturating_sub(began[place]));
                let interrupts = interrupts.parse().context("END without interrupts")?;
                let sample = sample(report, case, took, interrupts)?;
                self.samples.entry((case.to_owned(), number)).or_default().push(sample);
                say(format!(
                    "{case} {}: {:.0}/s, {:.1} MiB/s, {:.2} of {:.1} us, {:.3} interrupts",
                    ["file", "memory", "qemu-storage-daemon"][number],
                    sample.rate[0],
                    sample.rate[1],
                    sample.cpu[0] / 1e3,
                    sample.cpu[1] / 1e3,
                    sample.interrupts
                ));
            }
            ["VERDICT", "PASS"] => self.is_complete = true,
            ["VERDICT", ..] => bail!("{line}"),
            _ => {}
        }
        Ok(())
    }
}

/// Nanoseconds of the daemon, and of the whole: QEMU, in which the guest runs, and the daemon.
fn processor_times(qemu: u32, daemon: &Daemon) -> Result<[u64; 2]> {
    let daemon = processor_time(daemon.id())?;
    Ok([daemon, daemon + processor_time(qemu)?])
}

/// Nanoseconds for which all threads of a process ran.
fn processor_time(process: u32) -> Result<u64> {
    let mut sum = 0;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        // One that ended meanwhile was none of those that serve.
        let text = fs::read_to_string(thread?.path().join("schedstat")).unwrap_or_default();
        sum += text.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}

fn sample(report: &str, case: &str, took: [u64; 2], interrupts: u64) -> Result<Sample> {
    let fields: Vec<&str> = report.split(';').collect();
    let field = |number: usize| {
        let field = fields.get(number - 1).and_then(|field| field.parse::<f64>().ok());
        field.with_context(|| format!("fio's report is none: {report}"))
    };
    ensure!(field(5)? == 0.0, "fio: {report}");
    // KiB, KiB/s and requests/s of reads, and of writes.
    let first = if case.contains("write") { 47 } else { 6 };
    let kib = field(first)?;
    let block = if case.contains("-1m-") { 1024.0 } else { 4.0 };
    ensure!(kib > 0.0, "fio did nothing: {report}");
    let requests = kib / block;
    Ok(Sample {
        rate: [field(first + 2)?, field(first + 1)? / 1024.0],
        cpu: took.map(|time| time as f64 / requests),
        interrupts: interrupts as f64 / requests,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rows_of(case: &str, name: &str, unit: Unit, log: &Log, rows: &mut Vec<Row>) -> Result<()> {
    let of = |daemon: usize| {
        let samples = log.samples.get(&(case.to_owned(), daemon));
        samples.with_context(|| format!("{name} was not measured"))
    };
    let (words, place) = match unit {
        Unit::Requests => ("requests/s", 0),
        Unit::Mebibytes => ("MiB/s", 1),
    };
    let rate = move |sample: &Sample| sample.rate[place];
    let cpu = |sample: &Sample| sample.cpu[0] / 1e3;
    let all = |sample: &Sample| sample.cpu[1] / 1e3;
    let interrupts = |sample: &Sample| sample.interrupts;
    let peer = of(PEER)?;
    for (daemon, store) in [(FILE, "file"), (MEMORY, "memory")] {
        let ours = of(daemon)?;
        let row = |case: String, unit, better, value: &dyn Fn(&Sample) -> f64| {
            let middle = |samples: &[Sample]| median(samples.iter().map(value).collect());
            let theirs = Some((middle(peer), "qemu-storage-daemon"));
            let mut row = Row::new(NAME, case, unit, better, middle(ours), theirs);
            let ratios = ours.iter().zip(peer).map(|(ours, peer)| value(ours) / value(peer));
            row.ratio = Some(median(ratios.collect()));
            row
        };
        let whole = row(format!("{store}/{name}"), words, Better::Higher, &rate);
        rows.push(whole.aim(Aim::Times(1.0)));
        rows.push(row(format!("{store}/{name}/cpu"), "us/request", Better::Lower, &cpu));
        rows.push(row(format!("{store}/{name}/cpu-all"), "us/request", Better::Lower, &all));
        let case = format!("{store}/{name}/interrupts");
        rows.push(row(case, "a request", Better::Lower, &interrupts));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let mut fields = vec!["0"; 60];
        (fields[5], fields[6], fields[7]) = ("4096", "2048", "512");
        (fields[46], fields[47], fields[48]) = ("8192", "1024", "1");
        let read = sample(&fields.join(";"), "randread-4k-32", [1_024_000; 2], 512).unwrap();
        assert_eq!((read.rate, read.cpu, read.interrupts), ([512.0, 2.0], [1000.0; 2], 0.5));
        let write = sample(&fields.join(";"), "write-1m-4", [8000; 2], 4).unwrap();
        assert_eq!((write.rate, write.cpu, write.interrupts), ([1.0, 1.0], [1000.0; 2], 0.5));
        fields[4] = "5";
        assert!(sample(&fields.join(";"), "randread-4k-32", [1; 2], 1).is_err());
        assert!(sample("nonsense", "randread-4k-32", [1; 2], 1).is_err());
    }

    #[test]
    fn the_middle_counts() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
        assert!(median(Vec::new()).is_nan());
    }
}
