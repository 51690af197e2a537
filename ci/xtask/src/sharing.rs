//! How much of the source both wires share.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::project;

/// Who needs a crate.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Both,
    Xen,
    Virtio,
}

/// A row of the table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Engines,
    Wire,
    Frontend,
    Backend,
    Platform,
}

impl Part {
    const ALL: [Self; 5] =
        [Self::Engines, Self::Wire, Self::Frontend, Self::Backend, Self::Platform];

    fn title(self) -> &'static str {
        match self {
            Self::Engines => "engines and what they are made of",
            Self::Wire => "wires: encoding, rings, memory",
            Self::Frontend => "frontends: life cycle, adapters",
            Self::Backend => "backends: life cycle, stores",
            Self::Platform => "platforms",
        }
    }
}

/// Every crate by its folder, whole: nothing of one is counted as the other's.
const CRATES: [(&str, Part, Need); 14] = [
    ("core", Part::Engines, Need::Both),
    ("transports/xen", Part::Wire, Need::Xen),
    ("transports/virtio", Part::Wire, Need::Virtio),
    ("frontends/adapters", Part::Frontend, Need::Both),
    ("frontends/xen-blkfront", Part::Frontend, Need::Xen),
    ("frontends/virtio-blk-driver", Part::Frontend, Need::Virtio),
    ("backends/stores", Part::Backend, Need::Both),
    ("backends/xen-blkback", Part::Backend, Need::Xen),
    ("backends/virtio-blk-device", Part::Backend, Need::Virtio),
    ("platforms/pvh-guest", Part::Platform, Need::Both),
    ("platforms/xen-hypercalls", Part::Platform, Need::Xen),
    ("platforms/xen-guest", Part::Platform, Need::Xen),
    ("platforms/linux", Part::Platform, Need::Xen),
    ("platforms/qemu-virt", Part::Platform, Need::Virtio),
];

/// Not counted: it is there for tests.
const SIMULATED: &str = "platforms/simulated";

const RULE: &str = "\
A line counts that holds code: neither blank nor only a comment, in `src/` of a crate, outside of
`#[cfg(test)]`. A crate counts as a whole, for both wires if it is built for both, or for one. What
is there for tests, examples and tools is left out.";

/// Counts, and prints a table.
pub fn sharing() -> Result<()> {
    check_complete()?;
    let mut counted = Vec::new();
    for (folder, part, need) in CRATES {
        counted.push((part, need, lines_below(&project::root().join(folder).join("src"))?));
    }
    let sum = |part: Option<Part>, need: Need| -> usize {
        let counts = counted
            .iter()
            .filter(|(row, column, _)| part.is_none_or(|part| part == *row) && *column == need);
        counts.map(|(.., lines)| lines).sum()
    };
    println!(
        "{:36} {:>10} {:>10} {:>12}",
        "lines of code", "both wires", "Xen only", "VirtIO only"
    );
    let row = |title: &str, part| {
        let [both, xen, virtio] = [Need::Both, Need::Xen, Need::Virtio].map(|need| sum(part, need));
        println!("{title:36} {both:>10} {xen:>10} {virtio:>12}");
    };
    Part::ALL.into_iter().for_each(|part| row(part.title(), Some(part)));
    row("all", None);
    let without_platforms = |need| sum(None, need) - sum(Some(Part::Platform), need);
    let both = without_platforms(Need::Both);
    for (name, need) in [("Xen", Need::Xen), ("VirtIO", Need::Virtio)] {
        let own = without_platforms(need);
        let share = 100.0 * both as f64 / (both + own) as f64;
        println!(
            "of a disk on {name}, platforms aside, {share:.0} % are shared with the other wire"
        );
    }
    println!("\n{RULE}");
    Ok(())
}

/// No crate is forgotten.
fn check_complete() -> Result<()> {
    for room in ["transports", "frontends", "backends", "platforms"] {
        let entries = fs::read_dir(project::root().join(room)).context(room)?;
        for entry in entries {
            let name = entry?.file_name();
            let folder = format!("{room}/{}", name.to_string_lossy());
            let is_crate = project::root().join(&folder).join("Cargo.toml").exists();
            let is_known = CRATES.iter().any(|(known, ..)| *known == folder);
            if is_crate && !is_known && folder != SIMULATED {
                bail!("{folder} is not counted: name it in ci/xtask/src/sharing.rs");
            }
        }
    }
    Ok(())
}

fn lines_below(folder: &Path) -> Result<usize> {
    let mut lines = 0;
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let is_tests = path.file_stem().is_some_and(|name| name == "tests");
        if path.is_dir() {
            lines += lines_below(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_tests {
            lines += lines_of(&fs::read_to_string(&path)?);
        }
    }
    Ok(lines)
}

/// Lines of code in a file as rustfmt leaves it.
fn lines_of(text: &str) -> usize {
    let mut count = 0;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let code = line.trim_start();
        if code.starts_with("#[cfg(test)]") {
            skip_item(&mut lines, line.len() - code.len());
        } else if !code.is_empty() && !code.starts_with("//") {
            count += 1;
        }
    }
    count
}

/// Leaves out the item that comes next, which is indented so far.
fn skip_item<'a>(lines: &mut impl Iterator<Item = &'a str>, indent: usize) {
    let is_end = |line: &str| {
        let code = line.trim_start();
        line.len() - code.len() == indent && (code.ends_with(['}', ';']))
    };
    let _ = lines.find(|line| is_end(line));
}

#[cfg(test)]
mod tests {
    use super::lines_of;

    #[test]
    fn code_is_counted() {
        let text =
            "//! Docs.\n\nuse a::b; // why\n\n/// Docs.\nfn one() {\n    // Why.\n    two();\n}\n";
        assert_eq!(lines_of(text), 4);
    }

    #[test]
    fn tests_are_not() {
        let module = "#[cfg(test)]\nmod tests {\n    fn one() {\n    }\n}\nfn two() {}\n";
        assert_eq!(lines_of(module), 1);
        let elsewhere = "#[cfg(test)]\n#[path = \"x\"]\nmod tests;\nfn two() {}\n";
        assert_eq!(lines_of(elsewhere), 1);
    }
}
