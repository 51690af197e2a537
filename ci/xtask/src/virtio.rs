//! The unikernel on VirtIO: a guest of QEMU itself, without Xen.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::bare;
use crate::guests::image::Image;
use crate::guests::messages::Messages;
use crate::guests::transcript::{Transcript, value};
use crate::report::say;
use crate::rig::{Machine, Plain, Rig};

/// QEMU's exit status after the guest has ended normally, and after it has failed.
const POWERED_OFF: i32 = 33;
const CRASHED: i32 = 35;

/// The raw disk, in bytes, at first and in the end.
const RAW_BYTES: u64 = 64 << 20;
const RESIZED_BYTES: u64 = RAW_BYTES + (8 << 20);
/// The part of it whose digest the guest tells.
const DIGEST_BYTES: usize = 4 << 20;
/// Queues of the raw disk.
const QUEUES: u32 = 2;

/// One boot.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    machine: Machine,
    packed: bool,
    /// Segments of a page, so that requests need indirect tables, and sectors of 4096 bytes; else
    /// segments that grow as memory does, and sectors of 512.
    tables: bool,
}

impl Case {
    /// Every combination that `machine` and `packed` leave.
    pub fn all(machine: Option<Machine>, packed: Option<bool>) -> Vec<Self> {
        let mut cases = Vec::new();
        for it in Machine::ALL.into_iter().filter(|it| machine.is_none_or(|only| only == *it)) {
            for kind in [false, true].into_iter().filter(|it| packed.is_none_or(|is| is == *it)) {
                for tables in [false, true] {
                    cases.push(Self { machine: it, packed: kind, tables });
                }
            }
        }
        cases
    }

    /// What it is, for people.
    pub fn name(&self) -> String {
        format!(
            "virtio-{}-{}-{}",
            self.machine.name(),
            if self.packed { "packed" } else { "split" },
            if self.tables { "pages" } else { "runs" },
        )
    }

    fn sector(&self) -> u32 {
        if self.tables { 4096 } else { 512 }
    }

    /// Descriptors in a queue of the raw disk that QEMU is asked for: its least, few, or its own choice.
    fn queue_size(&self) -> u32 {
        match (self.tables, self.machine) {
            (false, Machine::Q35) => 4,
            (false, Machine::Microvm) => 16,
            (true, _) => 256,
        }
    }

    /// Descriptors that the guest finds: by memory-mapped registers QEMU 7.2 offers 1024 whatever it
    /// is asked for, of which the driver takes as many as it has use for. The limit of segments is that
    /// of the size that was asked for.
    fn offered_size(&self) -> u32 {
        match self.machine {
            Machine::Q35 => self.queue_size(),
            Machine::Microvm => 256,
        }
    }

    fn command_line(&self, words: &str) -> String {
        let packed = u8::from(self.packed);
        let segment = if self.tables { " segment=4" } else { "" };
        // The platform's own memory on one machine, `virtio-drivers`' on the other.
        let memory = if self.machine == Machine::Microvm { " memory=hal" } else { "" };
        let sectors = RESIZED_BYTES / 512;
        format!("packed={packed} queues={QUEUES}{segment}{memory} resize={sectors} {words}")
    }
}

/// The image, built, and the file system for it to read.
pub struct Virtio<'a> {
    rig: &'a Rig,
    program: PathBuf,
    image: Image,
    /// There when the guest sends `defmt` frames.
    messages: Option<Messages>,
}

impl<'a> Virtio<'a> {
    /// Builds the image, with `defmt` for messages or not.
    pub fn new(rig: &'a Rig, defmt: bool) -> Result<Self> {
        let features = if defmt { "virtio,defmt" } else { "virtio" };
        let program = bare::build_bin(
            bare::X86_64,
            "unikernel",
            "unikernel-virtio",
            &["--no-default-features", "--features", features],
        )?;
        let messages = if defmt { Some(Messages::of(&program)?) } else { None };
        Ok(Self { rig, program, image: Image::prepare(rig)?, messages })
    }

    /// Boots once and checks everything; `live` shows the console, without the list of files. Returns
    /// how long it took, in seconds.
    pub fn run(&self, case: &Case, words: &str, live: bool) -> Result<f64> {
        let name = case.name();
        let sector = case.sector();
        let plain = Plain {
            name: &name,
            machine: case.machine,
            image: &self.program,
            command_line: &case.command_line(words),
            files: &self.image.file,
            raw_bytes: RAW_BYTES,
            disk_options: if case.packed { ",packed=on" } else { "" },
            raw_options: &format!(
                ",num-queues={QUEUES},queue-size={},logical_block_size={sector},\
                 physical_block_size={sector}",
                case.queue_size(),
            ),
            timeout: Duration::from_secs(120),
        };
        let show = |line: &str| {
            if live && !line.starts_with("FILE ") {
                println!("{line}");
            }
        };
        let mut console = Vec::new();
        let mut transcript = Transcript::default();
        let ended = plain.run(self.rig, |bytes, monitor| {
            console.extend_from_slice(bytes);
            let line = String::from_utf8_lossy(bytes);
            let line = line.trim_end();
            if self.messages.is_none() {
                show(line);
                transcript.lines.push(line.to_owned());
            }
            // A frame may stand before it.
            if line.contains("RESIZE wanted") {
                monitor.resize(RESIZED_BYTES)?;
            }
            Ok(())
        })?;
        if let Some(messages) = &self.messages {
            transcript.lines = messages.decode(&console);
            transcript.lines.iter().for_each(|line| show(line));
        }
        transcript.ended = match ended.status {
            Some(POWERED_OFF) => "poweroff".to_owned(),
            Some(CRASHED) => "crash".to_owned(),
            Some(other) => format!("QEMU's exit status {other}"),
            None => "timeout".to_owned(),
        };
        let mut first = vec![0; DIGEST_BYTES];
        fs::File::open(&ended.raw)?.read_exact(&mut first).context("reading the raw disk")?;
        let digest: String =
            Sha256::digest(&first).iter().map(|byte| format!("{byte:02x}")).collect();
        transcript.disk = Some(format!("{digest} {DIGEST_BYTES}"));
        transcript.check_work(&self.image.entries)?;
        case.check(&transcript)?;
        let _ = fs::remove_file(&ended.raw);
        Ok(ended.seconds)
    }
}

impl Case {
    /// What was negotiated, and whether it was used.
    fn check(&self, transcript: &Transcript) -> Result<()> {
        let said = transcript
            .after("NEGOTIATED ")
            .find(|said| value(said, "device") == Some("raw"))
            .context("no line `NEGOTIATED device=raw ...`")?;
        let expected = [
            ("packed", u32::from(self.packed)),
            ("queues", QUEUES),
            ("size", self.offered_size()),
            ("sector", self.sector()),
            ("indirect", 1),
            ("event-index", 1),
            ("flush", 1),
            ("write-zeroes", 1),
        ];
        for (key, wanted) in expected {
            match value(said, key) {
                Some(found) if found.parse() == Ok(wanted) => {}
                found => bail!("{key} is {found:?}, asked for was {wanted}"),
            }
        }
        let queues: Vec<&str> = transcript.after("QUEUE ").collect();
        let used = |what: &str| queues.iter().any(|queue| queue.contains(what));
        if queues.len() != QUEUES as usize || used(" 0 requests") {
            bail!("not every queue was used: {queues:?}");
        }
        if self.tables && used("(0 indirect") {
            bail!("no indirect tables were used: {queues:?}");
        }
        if transcript.after("RESIZED ").count() != 1 {
            bail!("the guest did not notice that its disk was resized");
        }
        Ok(())
    }
}

/// `cargo xtask run --wire virtio`.
pub fn run(machine: Option<Machine>, packed: Option<bool>, defmt: bool, words: &str) -> Result<()> {
    let rig = Rig::prepare()?;
    let virtio = Virtio::new(&rig, defmt)?;
    for case in Case::all(machine, packed) {
        say(format!("booting {}, without Xen", case.name()));
        let seconds = virtio.run(&case, words, true).with_context(|| case.name())?;
        say(format!("ok: {} ({seconds:.1} s)", case.name()));
        println!();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_what_is_run() {
        assert_eq!(Case::all(None, None).len(), 8);
        assert_eq!(Case::all(Some(Machine::Q35), None).len(), 4);
        let cases = Case::all(Some(Machine::Microvm), Some(true));
        let names: Vec<String> = cases.iter().map(Case::name).collect();
        assert_eq!(names, ["virtio-microvm-packed-runs", "virtio-microvm-packed-pages"]);
    }

    #[test]
    fn a_case_that_was_not_negotiated_fails() {
        let case = Case { machine: Machine::Q35, packed: true, tables: true };
        let good = [
            "NEGOTIATED device=raw queues=2 size=256 packed=1 indirect=1 event-index=1 sector=4096 \
             flush=1 write-zeroes=1",
            "QUEUE 0: 7 requests, 9 on the ring (3 indirect with 3 tables)",
            "QUEUE 1: 7 requests, 9 on the ring (3 indirect with 3 tables)",
            "RESIZED to 147456 sectors, by an interrupt",
        ];
        let transcript = |lines: &[&str]| Transcript {
            lines: lines.iter().map(|line| (*line).to_owned()).collect(),
            ..Transcript::default()
        };
        case.check(&transcript(&good)).unwrap();
        for missing in 0..good.len() {
            let mut lines = good.to_vec();
            lines.remove(missing);
            assert!(case.check(&transcript(&lines)).is_err());
        }
        assert!(Case { packed: false, ..case }.check(&transcript(&good)).is_err());
        assert!(Case { tables: false, ..case }.check(&transcript(&good)).is_err());
    }
}
