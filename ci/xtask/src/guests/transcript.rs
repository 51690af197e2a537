//! What a guest said, what dom0 saw of it, and whether both are as they must be.

use anyhow::{Context, Result, bail};

use super::case::Case;
use super::image::{Entry, compare};

/// All that is known of one guest's run.
#[derive(Default)]
pub struct Transcript {
    /// Its console.
    pub lines: Vec<String>,
    /// How it ended, as `xl` saw it: `poweroff`, `crash`, `timeout`, ...
    pub ended: String,
    /// SHA-256 and size of what dom0 found on the disk that the guest had written.
    pub disk: Option<String>,
    /// What the frontend had written to XenStore: `key=value` words.
    pub nodes: String,
    /// From creation to end, in dom0's seconds.
    pub seconds: f64,
    /// What else the script in dom0 reported.
    pub reports: Vec<String>,
}

impl Transcript {
    /// Takes a line that the script in dom0 reports.
    pub fn take_report(&mut self, text: &str) {
        if let Some(how) = text.strip_prefix("ENDED ") {
            how.clone_into(&mut self.ended);
        } else if let Some(found) = text.strip_prefix("DISK ") {
            self.disk = Some(found.to_owned());
        } else if let Some(nodes) = text.strip_prefix("NODES ") {
            nodes.clone_into(&mut self.nodes);
        } else if let Some(times) = text.strip_prefix("SECONDS ") {
            let mut times = times.split(' ').filter_map(|time| time.parse::<f64>().ok());
            if let (Some(start), Some(end)) = (times.next(), times.next()) {
                self.seconds = end - start;
            }
        } else {
            self.reports.push(text.to_owned());
        }
    }

    /// How many bytes were compared: files read, and what was written to the disk.
    pub fn bytes_verified(&self) -> u64 {
        let files: u64 = self.after("FILE ").filter_map(Entry::parse).map(|file| file.size).sum();
        let disk = self.disk.as_deref().and_then(|found| found.split_once(' '));
        files + disk.and_then(|(_, bytes)| bytes.parse::<u64>().ok()).unwrap_or(0)
    }

    /// Everything that must hold after a run.
    pub fn check(&self, case: &Case, files: &[Entry]) -> Result<()> {
        self.check_work(files)?;
        self.check_negotiated(case)
    }

    /// What must hold whatever was negotiated: the verdict, the files, the disk.
    pub fn check_work(&self, files: &[Entry]) -> Result<()> {
        self.check_end()?;
        let found: Vec<Entry> = self.after("FILE ").filter_map(Entry::parse).collect();
        compare(files, &found)?;
        self.check_disk()
    }

    /// The guest's verdict, and how it ended.
    pub fn check_end(&self) -> Result<()> {
        self.check_verdict()?;
        if self.ended != "poweroff" {
            bail!("the guest said PASS, but it ended by {}", self.ended);
        }
        Ok(())
    }

    fn check_verdict(&self) -> Result<()> {
        if let Some(reason) = self.after("VERDICT FAIL").last() {
            bail!("the guest's verdict: FAIL{reason}{}", self.last_words());
        }
        // A Linux guest's kernel has the last word, marked with the time in brackets.
        let spoken = |line: &&str| !line.is_empty() && !line.starts_with('[');
        let last = self.lines.iter().rev().map(|line| line.trim()).find(spoken);
        match last {
            Some("VERDICT PASS") => Ok(()),
            Some(_) => bail!("no verdict; it ended by {}{}", self.ended, self.last_words()),
            None => bail!("the guest said nothing; it ended by {}", self.ended),
        }
    }

    fn check_disk(&self) -> Result<()> {
        let said = self
            .after("DISK-SHA256 ")
            .last()
            .context("the guest did not say what the disk must hold now")?;
        let (digest, bytes) = said.split_once(' ').context("DISK-SHA256 without a size")?;
        if digest.len() != 64 || bytes.parse::<u64>().ok().is_none_or(|bytes| bytes == 0) {
            bail!("DISK-SHA256 {said} makes no sense");
        }
        match &self.disk {
            Some(found) if found == said => Ok(()),
            Some(found) => bail!("the disk must hold {said}, but dom0 finds {found}"),
            None => bail!("dom0 did not look at the disk"),
        }
    }

    /// What the guest says of the disk `xvdb`, and what its frontend wrote to XenStore, must agree
    /// with what the case asks for.
    fn check_negotiated(&self, case: &Case) -> Result<()> {
        let said = self
            .after("NEGOTIATED ")
            .find(|said| value(said, "device") == Some("xvdb"))
            .context("no line `NEGOTIATED device=xvdb ...`")?;
        let expect = |source: &str, words: &str, key: &str, wanted: u32| match value(words, key) {
            Some(found) if found.parse() == Ok(wanted) => Ok(()),
            Some(found) => bail!("{source}: {key} is {found}, asked for was {wanted}"),
            None => bail!("{source} does not tell {key}"),
        };
        expect("the guest", said, "sector", case.sector)?;
        expect("the guest", said, "persistent", u32::from(case.persistent))?;
        if let Some(queues) = case.queues {
            expect("the guest", said, "queues", queues)?;
            // A single queue is the old layout, in which the number is not written.
            if queues > 1 {
                expect("XenStore", &self.nodes, "queues", queues)?;
            }
        }
        if let Some(order) = case.order {
            // Linux as a guest does not show it; XenStore does, and order 0 may go unwritten.
            if value(said, "order").is_some() {
                expect("the guest", said, "order", order)?;
            }
            if order > 0 {
                expect("XenStore", &self.nodes, "order", order)?;
            }
        }
        Ok(())
    }

    /// What follows `prefix` on the lines of the console that begin with it.
    pub fn after<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.lines.iter().filter_map(move |line| line.strip_prefix(prefix))
    }

    /// The end of the console.
    pub fn last_words(&self) -> String {
        let start = self.lines.len().saturating_sub(12);
        let words: Vec<String> =
            self.lines[start..].iter().map(|line| format!("\n| {line}")).collect();
        words.concat()
    }
}

/// What `words` has after `key=`.
pub fn value<'a>(words: &'a str, key: &str) -> Option<&'a str> {
    words.split(' ').filter_map(|word| word.split_once('=')).find(|word| word.0 == key).map(|w| w.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> (Transcript, Case, Vec<Entry>) {
        let digest = "ab".repeat(32);
        let lines = vec![
            "NEGOTIATED device=xvda order=0 queues=1 persistent=1 sector=512".into(),
            "NEGOTIATED device=xvdb order=2 queues=4 persistent=1 sector=512".into(),
            format!("FILE {digest} 7 /a b"),
            format!("DISK-SHA256 {digest} 4096"),
            "VERDICT PASS".into(),
        ];
        let mut transcript = Transcript { lines, ..Transcript::default() };
        for line in ["ENDED poweroff", "NODES order=2 queues=4 feature-persistent=1"] {
            transcript.take_report(line);
        }
        transcript.take_report(&format!("DISK {digest} 4096"));
        let case = Case { order: Some(2), queues: Some(4), ..Case::plain("x") };
        (transcript, case, vec![Entry { digest, size: 7, path: "/a b".into() }])
    }

    #[test]
    fn a_good_run_passes() {
        let (transcript, case, files) = good();
        transcript.check(&case, &files).unwrap();
    }

    #[test]
    fn a_case_that_was_not_negotiated_fails() {
        let (transcript, case, files) = good();
        for other in [
            Case { order: Some(4), ..case.clone() },
            Case { queues: Some(1), ..case.clone() },
            Case { persistent: false, ..case.clone() },
            Case { sector: 4096, ..case.clone() },
        ] {
            assert!(transcript.check(&other, &files).is_err());
        }
    }

    #[test]
    fn each_missing_or_wrong_line_fails() {
        type Change = fn(&mut Transcript);
        let changes: [Change; 10] = [
            |t| t.lines[2] = "FILE 00 7 /a b".into(),
            |t| drop(t.lines.remove(2)),
            |t| drop(t.lines.remove(3)),
            |t| drop(t.lines.pop()),
            |t| t.lines.push("panicked".into()),
            |t| t.lines.insert(0, "VERDICT FAIL x".into()),
            |t| t.disk = Some("cd 4096".into()),
            |t| t.disk = None,
            |t| t.ended = "crash".into(),
            |t| t.nodes = "order=- queues=-".into(),
        ];
        for change in changes {
            let (mut transcript, case, files) = good();
            change(&mut transcript);
            assert!(transcript.check(&case, &files).is_err());
        }
    }
}
