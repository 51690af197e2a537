//! fio, built statically: Debian's own needs half a hundred libraries in the guest.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::say;
use crate::rig::{Apt, Rig, Suite, stamp};
use crate::shell;

/// The program; fetched and built once.
pub fn prepare(rig: &Rig) -> Result<PathBuf> {
    let folder = project::rig().join("fio");
    let program = folder.join("fio");
    let key = include_str!("fio.rs");
    stamp::once(&project::rig().join("stamps/fio"), key, "building fio", || {
        let is_here = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
        if !is_here("gcc") {
            bail!("gcc is not here, and fio is built from source");
        }
        let make = match is_here("make") {
            true => PathBuf::from("make"),
            false => {
                rig.add(&["make"])?;
                rig.packages().path("usr/bin/make")
            }
        };
        stamp::fresh(&folder)?;
        let apt = Apt::new(project::rig().join("apt"), Suite::RIG)?;
        let aio = folder.join("aio");
        apt.unpack(&["libaio-dev".into(), "libaio1".into()], &aio)?;
        let source = fetch(&folder)?;
        build(&make, &source, &aio.join("usr"))?;
        fs::copy(source.join("fio"), &program)?;
        shell::output(Command::new("strip").arg(&program))?;
        fs::remove_dir_all(&source)?;
        Ok(())
    })?;
    Ok(program)
}

/// Downloads and unpacks the source that belongs to the release's package.
fn fetch(folder: &Path) -> Result<PathBuf> {
    let state = folder.join("apt");
    fs::create_dir_all(state.join("lists/partial"))?;
    let sources = state.join("sources.list.d");
    fs::create_dir_all(&sources)?;
    source_lists(&sources)?;
    say("downloading fio's source");
    let apt = |words: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.arg("-c").arg(project::rig().join("apt/apt.conf")).arg("-o");
        apt.arg(format!("Dir::State::lists={}", state.join("lists").display())).arg("-o");
        apt.arg("Dir::Etc::sourcelist=/dev/null").arg("-o");
        apt.arg(format!("Dir::Etc::sourceparts={}", sources.display()));
        apt.args(words).current_dir(&state).env("LC_ALL", "C");
        shell::output(&mut apt)
    };
    apt(&["update"])?;
    apt(&["source", "--download-only", "fio"])
        .context("the package sources do not have fio's source")?;
    let archive = fs::read_dir(&state)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(".orig.tar"))
        .context("no source archive came")?;
    let source = folder.join("source");
    fs::create_dir_all(&source)?;
    shell::output(
        Command::new("tar")
            .arg("-xf")
            .arg(archive)
            .arg("-C")
            .arg(&source)
            .arg("--strip-components=1"),
    )?;
    Ok(source)
}

/// The rig's package sources with `deb-src` in the place of `deb`; third parties' are left out.
fn source_lists(into: &Path) -> Result<()> {
    let own = project::rig().join("apt/sources");
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    for folder in [Path::new("/etc/apt/sources.list.d"), &own] {
        files.extend(fs::read_dir(folder).into_iter().flatten().flatten().map(|it| it.path()));
    }
    // On another release the rig has its own, translated lists.
    if files.iter().any(|file| file.starts_with(&own)) {
        files.retain(|file| file.starts_with(&own));
    }
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        if let (Some(text), Some(name)) = (as_source(&text), file.file_name()) {
            fs::write(into.join(name), text)?;
        }
    }
    Ok(())
}

fn as_source(text: &str) -> Option<String> {
    let is_debian = |text: &str| text.contains("debian") && text.contains("bookworm");
    let lines: Vec<String> = text
        .lines()
        .filter_map(|line| match line.split_once(char::is_whitespace) {
            Some(("deb", rest)) => is_debian(rest).then(|| format!("deb-src {rest}")),
            Some(("Types:", _)) => Some("Types: deb-src".to_owned()),
            Some(("deb-src", _)) => None,
            _ => Some(line.to_owned()),
        })
        .collect();
    let text = lines.join("\n") + "\n";
    (is_debian(&text) && text.contains("deb-src")).then_some(text)
}

fn build(make: &Path, source: &Path, aio: &Path) -> Result<()> {
    let library = format!("-L{}", aio.join("lib/x86_64-linux-gnu").display());
    let include = format!("-I{}", aio.join("include").display());
    let mut configure = Command::new("./configure");
    configure.current_dir(source).args(["--build-static", "--disable-native", "--disable-shm"]);
    for feature in ["http", "rbd", "rados", "gfapi", "libnfs", "pmem", "rdma", "numa"] {
        configure.arg(format!("--disable-{feature}"));
    }
    shell::output(configure.arg(format!("--extra-cflags={include} {library}")))?;
    // The library's folder must be known to the linker too.
    let settings = source.join("config-host.mak");
    let text = fs::read_to_string(&settings)?;
    if !text.contains("CONFIG_LIBAIO=y") {
        bail!("fio's configuration does not find libaio");
    }
    let flag = "LDFLAGS+=-static";
    let text = text.replace("LDFLAGS+= -static", flag);
    if !text.contains(flag) {
        bail!("fio's configuration is not what it was: no static linking in it");
    }
    fs::write(&settings, text.replace(flag, &format!("{flag} {library}")))?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = Command::new(make);
    make.current_dir(source).arg(format!("-j{jobs}")).arg("fio").env_remove("MAKEFLAGS");
    for name in ["CFLAGS", "LDFLAGS"] {
        if env::var_os(name).is_some() {
            make.env_remove(name);
        }
    }
    shell::output(&mut make).map(drop)
}

#[cfg(test)]
mod tests {
    use super::as_source;

    #[test]
    fn sources_are_asked_for_in_both_formats() {
        let line = "deb http://deb.debian.org/debian bookworm main\n";
        assert_eq!(as_source(line).unwrap(), line.replace("deb ", "deb-src "));
        let stanza = "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n";
        assert_eq!(as_source(stanza).unwrap(), stanza.replace("Types: deb", "Types: deb-src"));
        assert!(as_source("deb https://example.org/apt stable main\n").is_none());
    }
}
