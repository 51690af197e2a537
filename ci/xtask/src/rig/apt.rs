//! Debian packages, fetched by a private apt: nothing is installed, nobody needs to be root.
//!
//! The private apt has its own lists, its own cache and an *empty* dpkg status. So it resolves the
//! whole closure of what is asked for, whatever is installed on this machine, and what it
//! unpacks runs with its own libraries. Sources and keys are the system's own; on a Debian that is
//! not the release asked for, the sources are read with that release's name in place of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::stamp;
use crate::report::say;
use crate::shell;

/// Which of Debian's packages.
#[derive(Clone, Copy)]
pub struct Suite {
    /// The release.
    pub release: &'static str,
    /// For which processors.
    pub architecture: &'static str,
}

impl Suite {
    /// The release whose QEMU 7.2 and Xen 4.17 the rig is made for: QEMU 10 kills PVH guests.
    pub const RIG: Self = Self { release: "bookworm", architecture: "amd64" };
}

/// A private apt state in a folder of its own.
pub struct Apt {
    folder: PathBuf,
    suite: Suite,
    /// The folder with `sources.list` and `sources.list.d`.
    sources: PathBuf,
}

/// The system's own sources.
const SOURCES: &str = "/etc/apt";

impl Apt {
    /// Sets up the state in `folder` and fetches the package lists, once.
    pub fn new(folder: PathBuf, suite: Suite) -> Result<Self> {
        Self::with_sources(folder, suite, SOURCES.into())
    }

    fn with_sources(folder: PathBuf, suite: Suite, sources: PathBuf) -> Result<Self> {
        let apt = Self { folder, suite, sources };
        let key = match suite.architecture {
            "amd64" => suite.release.to_owned(),
            other => format!("{} {other}", suite.release),
        };
        let stamp = apt.folder.join("stamp");
        if !apt.has_lists() {
            // Whatever the stamp says: it may be of a time when none came and that was no error.
            let _ = fs::remove_file(&stamp);
        }
        let mut all = true;
        stamp::once(&stamp, &key, "fetching package lists", || {
            apt.set_up()?;
            all = apt.update()?;
            Ok(())
        })?;
        if !all {
            // Good enough for this time. The next one asks again.
            let _ = fs::remove_file(&stamp);
        }
        Ok(apt)
    }

    fn has_lists(&self) -> bool {
        let Ok(entries) = fs::read_dir(self.folder.join("lists")) else { return false };
        let is_list = |name: &str| name.ends_with("_Packages") || name.contains("_Packages.");
        entries.flatten().any(|entry| is_list(&entry.file_name().to_string_lossy()))
    }

    /// The closure of `packages`: their names and those of all that they depend on.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let plan = shell::output(self.get().arg("-s").arg("install").args(packages))?;
        Ok(plan
            .lines()
            .filter_map(|line| line.strip_prefix("Inst "))
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    /// The version that would be fetched of `package`.
    pub fn candidate(&self, package: &str) -> Result<String> {
        let policy = shell::output(self.tool("apt-cache").arg("policy").arg(package))?;
        policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "))
            .filter(|version| *version != "(none)")
            .map(str::to_owned)
            .with_context(|| format!("the system's package sources do not have {package}"))
    }

    /// What `package` depends on directly, first alternatives only.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let listing = shell::output(self.tool("apt-cache").arg("depends").arg(package))?;
        Ok(listing
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .collect())
    }

    /// Downloads `packages` and returns the files.
    pub fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        let folder = self.folder.join("download");
        stamp::fresh(&folder)?;
        say(format!("downloading {} packages", packages.len()));
        let fetch = || {
            shell::output(self.get().arg("download").args(packages).current_dir(&folder)).map(drop)
        };
        // Lists grow old: a package may have moved on since they were fetched.
        fetch().or_else(|_| self.update().and_then(|_| fetch())).context(
            "downloading failed: is there a network, and does `apt-get update` work here?",
        )?;
        let mut files = Vec::new();
        for entry in fs::read_dir(&folder)? {
            files.push(entry?.path());
        }
        files.sort();
        if files.len() < packages.len() {
            bail!("asked for {} packages, got {}", packages.len(), files.len());
        }
        Ok(files)
    }

    /// Downloads `packages` and unpacks them into `root`, which is emptied first.
    pub fn unpack(&self, packages: &[String], root: &Path) -> Result<()> {
        stamp::fresh(root)?;
        self.add(packages, root)
    }

    /// Downloads `packages` and unpacks them into `root`, beside what is there.
    pub fn add(&self, packages: &[String], root: &Path) -> Result<()> {
        let files = self.download(packages)?;
        say(format!("unpacking {} packages", files.len()));
        for file in &files {
            shell::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(root))?;
            fs::remove_file(file)?;
        }
        Ok(())
    }

    fn set_up(&self) -> Result<()> {
        if Command::new("apt-get").arg("--version").output().is_err() {
            bail!(
                "apt-get is not here. The rig takes Xen's tools and a kernel for dom0 from Debian's \
                 packages: use a Debian machine or container"
            );
        }
        stamp::fresh(&self.folder)?;
        let here = self.folder.display();
        let Suite { release, architecture } = self.suite;
        for folder in ["lists/partial", "cache/archives/partial", "sources"] {
            fs::create_dir_all(self.folder.join(folder))?;
        }
        fs::write(self.folder.join("status"), "")?;
        let mut settings = format!(
            r#"Dir::State "{here}";
Dir::State::lists "{here}/lists";
Dir::State::status "{here}/status";
Dir::Cache "{here}/cache";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Default-Release "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Retries "3";
Debug::NoLocking "true";
#clear APT::Update;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
"#
        );
        if let Some(own) = system_release().filter(|own| own != release) {
            say(format!("this is {own}: reading its package sources as {release}"));
            translate_sources(&self.sources, &self.folder.join("sources"), &own, release)?;
            settings.push_str(&format!(
                "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{here}/sources\";\n"
            ));
        } else {
            let sources = self.sources.display();
            settings.push_str(&format!(
                "Dir::Etc::sourcelist \"{sources}/sources.list\";\n\
                 Dir::Etc::sourceparts \"{sources}/sources.list.d\";\n"
            ));
        }
        fs::write(self.folder.join("apt.conf"), settings)?;
        Ok(())
    }

    /// Fetches the lists; `false` if not all came. Mirrors now and then have one that is not the one
    /// they promise: the others are used then, and if a package is not in them, that is said when it is
    /// asked for.
    fn update(&self) -> Result<bool> {
        // Left to itself, apt takes lists that do not come for a warning.
        let mut update = self.get();
        update.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        let result = shell::output(&mut update);
        if !self.has_lists() {
            let error = result.err().unwrap_or_else(|| anyhow!("apt-get found no package lists"));
            return Err(error.context("no network? No package list came"));
        }
        if result.is_err() {
            say("not all package lists came: going on with the others");
        }
        Ok(result.is_ok())
    }

    fn get(&self) -> Command {
        let mut command = self.tool("apt-get");
        command.arg("-y");
        command
    }

    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        // `-c` is read after the system's own settings, so that these win.
        command.arg("-c").arg(self.folder.join("apt.conf")).env("LC_ALL", "C");
        command
    }
}

fn system_release() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(name.trim_matches('"').to_owned())
}

fn translate_sources(from: &Path, folder: &Path, own: &str, release: &str) -> Result<()> {
    let mut files = vec![from.join("sources.list")];
    if let Ok(entries) = fs::read_dir(from.join("sources.list.d")) {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    for file in files {
        let named = file.extension().is_some_and(|end| end == "list" || end == "sources");
        if let (true, Ok(text)) = (named, fs::read_to_string(&file)) {
            let name = file.file_name().unwrap_or_default();
            fs::write(folder.join(name), text.replace(own, release))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::project;

    const PACKAGE: &str = "Package: hello\nVersion: 1:7.2\nArchitecture: amd64\nMaintainer: x\n\
                           Filename: ./hello.deb\nSize: 1\nSHA256: \
                           e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n\
                           Description: x\n\n";

    #[test]
    fn a_first_run_without_a_network_does_not_spoil_the_next_one() {
        if Command::new("apt-get").arg("--version").output().is_err() {
            eprintln!("SKIPPED: apt-get is not here");
            return;
        }
        let folder = project::target().join("test-apt");
        stamp::fresh(&folder).unwrap();
        let (state, sources) = (folder.join("apt"), folder.join("sources"));
        let repository = folder.join("repository");
        fs::create_dir_all(sources.join("sources.list.d")).unwrap();
        fs::create_dir_all(&repository).unwrap();
        fs::write(repository.join("Packages"), PACKAGE).unwrap();
        let there = format!("deb [trusted=yes] file:{} ./\n", repository.display());
        // Nobody listens at port 1.
        let missing = "deb [trusted=yes] http://127.0.0.1:1/debian bookworm main\n";
        let open = |text: &str| {
            fs::write(sources.join("sources.list"), text).unwrap();
            Apt::with_sources(state.clone(), Suite::RIG, sources.clone())
        };
        for _ in 0..2 {
            let error = format!("{:#}", open(missing).err().expect("no list can have come"));
            assert!(error.contains("no network?"), "{error}");
            assert!(!state.join("stamp").exists());
        }
        // What an earlier run without a network may have left.
        fs::write(state.join("stamp"), "bookworm").unwrap();
        // Some of the lists: they are used, and asked for again the next time.
        let apt = open(&format!("{missing}{there}")).unwrap();
        assert_eq!(apt.candidate("hello").unwrap(), "1:7.2");
        assert!(!state.join("stamp").exists());
        let apt = open(&there).unwrap();
        assert_eq!(apt.candidate("hello").unwrap(), "1:7.2");
        assert!(state.join("stamp").exists());
        assert!(apt.candidate("qemu-system-x86").is_err());
        fs::remove_dir_all(&folder).unwrap();
    }
}
