//! Guests with disks on real Xen: our unikernel, or Linux to prove the rig itself.

pub mod case;
pub mod image;
pub mod messages;
pub mod transcript;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::bare;
use crate::bench::fio;
use crate::host;
use crate::report::say;
use crate::rig::{Boot, Event, Outcome, Rig};
use case::{Case, Console, Kind};
use image::Image;
use messages::Messages;
use transcript::Transcript;

/// Programs of a Linux guest that uses its disk in every way: their paths there, and their files.
pub fn programs(rig: &Rig) -> Result<Vec<(&'static str, PathBuf)>> {
    let history = host::build("pvblk-history-client")?;
    Ok(vec![("bin/fio", fio::prepare(rig)?), ("bin/history", history)])
}

/// A kind of guest with its image built, and the file system for it to read.
pub struct Guest<'a> {
    rig: &'a Rig,
    kind: Kind,
    image: Image,
    /// Files that dom0 creates the guest from.
    files: Vec<(String, PathBuf)>,
    /// There when the guest sends `defmt` frames.
    messages: Option<Messages>,
}

impl<'a> Guest<'a> {
    /// A PVH image that is there already.
    pub fn image(rig: &'a Rig, program: PathBuf) -> Result<Self> {
        Self::new(rig, Kind::Unikernel, vec![("guests/unikernel".into(), program)])
    }

    /// Builds our unikernel for `x86_64` with `features`.
    pub fn unikernel(rig: &'a Rig, features: &[&str]) -> Result<Self> {
        let program = bare::build(bare::X86_64, "unikernel", features)?;
        let messages = match features.contains(&"defmt") {
            true => Some(Messages::of(&program)?),
            false => None,
        };
        Ok(Self { messages, ..Self::image(rig, program)? })
    }

    /// Linux as a guest.
    pub fn linux(rig: &'a Rig) -> Result<Self> {
        let (kernel, initramfs) = rig.linux_guest()?;
        let files = vec![("guests/vmlinux".into(), kernel), ("guests/domu.cpio".into(), initramfs)];
        Self::new(rig, Kind::Linux, files)
    }

    fn new(rig: &'a Rig, kind: Kind, mut files: Vec<(String, PathBuf)>) -> Result<Self> {
        let image = Image::prepare(rig)?;
        files.push(("guests/ext4.img".into(), image.file.clone()));
        Ok(Self { rig, kind, image, files, messages: None })
    }

    /// Boots once with a single guest; `live` shows its console as it comes.
    pub fn run_one(&self, case: &Case, live: bool) -> Result<()> {
        let mut result = Err(anyhow!("the guest was not created"));
        let outcome =
            self.boot(&case.name, std::slice::from_ref(case), live, |_, _, checked| {
                result = checked;
            })?;
        say(format!("{}: the machine ran for {:.1} s", case.name, outcome.seconds));
        if result.is_err() {
            outcome.debug_port().iter().for_each(say);
        }
        outcome.check()?;
        result
    }

    /// Boots once, runs one guest for each of `cases` and hands each result to `done`.
    pub fn run_all(
        &self,
        name: &str,
        cases: &[Case],
        done: impl FnMut(&Case, &Transcript, Result<()>),
    ) -> Result<Outcome> {
        self.boot(name, cases, false, done)
    }

    fn boot(
        &self,
        name: &str,
        cases: &[Case],
        live: bool,
        mut done: impl FnMut(&Case, &Transcript, Result<()>),
    ) -> Result<Outcome> {
        let mut files = Vec::new();
        let mut list = String::new();
        for case in cases {
            let configuration = self.kind.configuration(case);
            files.push((format!("guests/{}.cfg", case.name), configuration.into_bytes()));
            list.push_str(&case.line(match live {
                _ if self.messages.is_some() => Console::Bytes,
                true => Console::Live,
                false => Console::Later,
            }));
        }
        files.push(("guests/cases".into(), list.into_bytes()));
        let boot = Boot {
            name,
            scenario: "disks",
            files,
            copies: self.files.clone(),
            // Under a clock of its own a run does not depend on what else the machine does; and
            // with its processors on several threads, QEMU 7.2 now and then loses a guest.
            deterministic: true,
            timeout: Duration::from_secs(
                120 + cases.iter().map(|c| u64::from(c.seconds)).sum::<u64>(),
            ),
            ..Boot::default()
        };
        say(format!("booting Xen with Linux as dom0; guests: {}", cases.len()));
        let mut current: Option<(&Case, Transcript)> = None;
        let mut finish = |current: Option<(&Case, Transcript)>| {
            if let Some((case, transcript)) = current {
                let checked = transcript.check(case, &self.image.entries);
                done(case, &transcript, checked);
            }
        };
        let mut bytes = Vec::new();
        let mut left: Vec<&Case> = cases.iter().collect();
        let outcome = boot.run(self.rig, |event| match event {
            Event::Guest(text) => {
                if let Some((_, transcript)) = &mut current {
                    if live {
                        println!("{text}");
                    }
                    transcript.lines.push(text.trim_end().to_owned());
                }
            }
            Event::Bytes(text) => bytes.extend(messages::bytes(text)),
            Event::Report(text) => {
                if let (Some((_, transcript)), Some(messages), false) =
                    (&mut current, &self.messages, bytes.is_empty())
                {
                    let lines = messages.decode(&std::mem::take(&mut bytes));
                    if live {
                        lines.iter().for_each(|line| println!("{line}"));
                    }
                    transcript.lines.extend(lines);
                }
                if let Some(name) = text.strip_prefix("CASE ") {
                    finish(current.take());
                    let at = left.iter().position(|case| case.name == name);
                    current = at.map(|at| (left.remove(at), Transcript::default()));
                } else if let Some((case, transcript)) = &mut current {
                    if let Some(why) = text.strip_prefix("AGAIN ") {
                        say(format!("{} is run again: {why}", case.name));
                        *transcript = Transcript::default();
                    }
                    transcript.take_report(text);
                }
                if text.starts_with("dom0: ") && (live || text.contains("xl:")) {
                    say(text);
                }
            }
        })?;
        finish(current.take());
        // The logs are shown with the first of them only.
        let mut why = outcome.check();
        for case in left {
            let missing = why.and(Err(anyhow!("the guest was not created")));
            done(case, &Transcript::default(), missing);
            why = Ok(());
        }
        Ok(outcome)
    }
}
