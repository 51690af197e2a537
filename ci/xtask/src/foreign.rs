//! Two of our guests that share pages on real Xen: `examples/foreign.rs` of `xen-guest`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bare;
use crate::project;
use crate::report::say;
use crate::rig::{Boot, Event, Rig};
use crate::shell;

/// What the two guests are, and what each of them must say at its end.
const ROLES: [&str; 2] = ["owner", "mapper"];

/// Boots Xen with both guests. `live` shows their consoles as they come.
pub fn run(rig: &Rig, live: bool) -> Result<()> {
    let image = build()?;
    let files = ROLES.iter().map(|role| {
        let configuration = format!(
            "name=\"{role}\"\ntype=\"pvh\"\nkernel=\"/guests/foreign\"\ncmdline=\"role={role}\"\n\
             memory=128\nvcpus=1\ntsc_mode=\"native\"\n\
             on_poweroff=\"preserve\"\non_reboot=\"preserve\"\non_crash=\"preserve\"\n"
        );
        (format!("guests/{role}.cfg"), configuration.into_bytes())
    });
    let boot = Boot {
        name: "foreign",
        scenario: "foreign",
        files: files.collect(),
        copies: vec![("guests/foreign".into(), image)],
        deterministic: true,
        timeout: Duration::from_secs(300),
        ..Boot::default()
    };
    say("booting Xen with Linux as dom0; two guests share pages");
    let (mut lines, mut domains) = (Vec::new(), None);
    let outcome = boot.run(rig, |event| match event {
        Event::Guest(text) => {
            if live {
                println!("{text}");
            }
            lines.push(text.trim_end().to_owned());
        }
        Event::Report(text) => {
            if let Some(count) = text.strip_prefix("DOMAINS ") {
                domains = Some(count.trim().to_owned());
            } else if live || text.contains("xl:") {
                say(text);
            }
        }
        Event::Bytes(_) => {}
    })?;
    say(format!("two guests: the machine ran for {:.1} s", outcome.seconds));
    let checked = check(&lines, domains.as_deref());
    if checked.is_err() {
        outcome.debug_port().iter().for_each(say);
    }
    checked.with_context(|| last_words(&lines))?;
    outcome.check()
}

fn build() -> Result<PathBuf> {
    say(format!("building the example foreign for {}", bare::X86_64));
    let mut cargo = bare::cargo(bare::X86_64, "build")?;
    cargo.args(["--quiet", "--release", "--package", "xen-guest", "--example", "foreign"]);
    shell::run(&mut cargo)?;
    Ok(project::target().join("bare").join(bare::X86_64).join("release/examples/foreign"))
}

/// Both guests count what they tried, nothing failed, and no domain but dom0 is left.
fn check(lines: &[String], domains: Option<&str>) -> Result<()> {
    let failed: Vec<_> = lines.iter().filter(|line| line.starts_with("FAIL ")).collect();
    ensure!(failed.is_empty(), "{failed:?}");
    let counts: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix("foreign: ")).collect();
    if counts.len() != ROLES.len() || !counts.iter().all(|count| count.ends_with(" 0 failed")) {
        bail!("each of the guests must come to its end, and these did: {counts:?}");
    }
    ensure!(domains == Some("1"), "domains are left: {domains:?}, dom0 included");
    Ok(())
}

fn last_words(lines: &[String]) -> String {
    let start = lines.len().saturating_sub(12);
    lines[start..].iter().map(|line| format!("\n| {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::check;

    fn lines(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn both_guests_must_end_well() {
        let good = lines(&["ok   x", "foreign: 3 passed, 0 failed", "foreign: 9 passed, 0 failed"]);
        check(&good, Some("1")).unwrap();
        assert!(check(&good, Some("2")).is_err());
        assert!(check(&good, None).is_err());
        assert!(check(&good[..2], Some("1")).is_err());
        let bad = lines(&["FAIL x", "foreign: 3 passed, 0 failed", "foreign: 9 passed, 0 failed"]);
        assert!(check(&bad, Some("1")).is_err());
        let bad = lines(&["foreign: 3 passed, 1 failed", "foreign: 9 passed, 0 failed"]);
        assert!(check(&bad, Some("1")).is_err());
    }
}
