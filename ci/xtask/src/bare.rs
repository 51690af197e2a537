//! Programs for bare metal, and the toolchain that builds them.
//!
//! Whoever has the target in the active toolchain, or can add it with rustup, uses that. Where
//! rustup cannot download, Debian's `rustc-web` packages serve as a private toolchain in
//! `target/rig/toolchain`: its `core` and `alloc` are built once from its own sources. With
//! `PVBLK_PRIVATE_TOOLCHAIN` set, it is used in any case.

use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::project;
use crate::report::say;
use crate::rig::{Apt, Suite, stamp};
use crate::shell;

/// 64-bit x86 without an operating system.
pub const X86_64: &str = "x86_64-unknown-none";
/// 64-bit Arm without an operating system.
pub const AARCH64: &str = "aarch64-unknown-none";

/// Packages of Debian's newest Rust; `libstd-rust-web-dev` names the version of the rest.
const PACKAGES: [&str; 4] = ["rustc-web", "libstd-rust-web-dev", "rust-web-src", "rust-web-clippy"];

/// What the packages depend on and nobody needs here: a C compiler, and libraries that every
/// Debian has and that must match the system's own loader.
const UNUSED: [&str; 9] =
    ["binutils", "gcc", "cpp", "libc6", "libgcc", "libstdc++", "linux-libc", "rpcsvc", "libc-"];

/// Builds `package` for bare metal, optimized, and returns the image.
pub fn build(target: &str, package: &str, features: &[&str]) -> Result<PathBuf> {
    say(format!("building {package} for {target}"));
    let mut cargo = cargo(target, "build")?;
    cargo.args(["--quiet", "--release", "--package", package]);
    if !features.is_empty() {
        cargo.arg("--features").arg(features.join(","));
    }
    shell::run(&mut cargo)?;
    Ok(folder().join(target).join("release").join(package))
}

/// As [`build`], for one program of a package that has several. `words` choose the features.
pub fn build_bin(target: &str, package: &str, bin: &str, words: &[&str]) -> Result<PathBuf> {
    say(format!("building {bin} for {target}"));
    let mut cargo = cargo(target, "build")?;
    cargo.args(["--quiet", "--release", "--package", package, "--bin", bin]).args(words);
    shell::run(&mut cargo)?;
    Ok(folder().join(target).join("release").join(bin))
}

/// `cargo SUBCOMMAND` for `target`, with a toolchain that has it.
pub fn cargo(target: &str, subcommand: &str) -> Result<Command> {
    let toolchain = toolchain(target)?;
    let mut cargo = Command::new("cargo");
    cargo.current_dir(project::root()).arg(subcommand);
    cargo.arg("--target").arg(target).arg("--target-dir").arg(folder());
    cargo.env_remove("RUSTFLAGS");
    if env::var_os("DEFMT_LOG").is_none() {
        // Otherwise defmt keeps nothing but errors.
        cargo.env("DEFMT_LOG", "debug");
    }
    if let Some(path) = toolchain {
        cargo.env("RUSTUP_TOOLCHAIN", path);
    }
    if target == X86_64 {
        // Xen loads a PVH image where its headers say: nothing relocates it.
        cargo.env("CARGO_TARGET_X86_64_UNKNOWN_NONE_RUSTFLAGS", "-Crelocation-model=static");
    }
    Ok(cargo)
}

/// Bare-metal output, apart from the host's: another toolchain may have made it.
fn folder() -> PathBuf {
    project::target().join("bare")
}

/// The private toolchain's folder, or nothing when the active toolchain has the target.
fn toolchain(target: &str) -> Result<Option<PathBuf>> {
    let private = project::rig().join("toolchain/usr");
    let forced = env::var_os("PVBLK_PRIVATE_TOOLCHAIN").is_some();
    if !forced && active_has(target)? {
        return Ok(None);
    }
    if !forced && !has(&private, target) {
        say(format!("adding the target {target} with rustup"));
        let added = shell::output(Command::new("rustup").args(["target", "add", target]));
        if added.is_ok() && active_has(target)? {
            return Ok(None);
        }
        say("rustup cannot add it here: using Debian's rustc as a private toolchain");
    }
    stamp::once(
        &project::rig().join("stamps/toolchain"),
        &[X86_64, AARCH64].join(" "),
        "preparing a private bare-metal toolchain",
        || prepare(&private),
    )?;
    if !has(&private, target) {
        bail!(
            "the private toolchain lacks {target}: remove target/rig/stamps/toolchain, try again"
        );
    }
    Ok(Some(private))
}

fn active_has(target: &str) -> Result<bool> {
    let sysroot = shell::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    Ok(has(Path::new(sysroot.trim()), target))
}

fn has(sysroot: &Path, target: &str) -> bool {
    fs::read_dir(libraries(sysroot, target)).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
    })
}

fn libraries(sysroot: &Path, target: &str) -> PathBuf {
    sysroot.join("lib/rustlib").join(target).join("lib")
}

fn prepare(prefix: &Path) -> Result<()> {
    let root = prefix.parent().context("a toolchain without a parent folder")?;
    stamp::fresh(root)?;
    let apt = Apt::new(project::rig().join("apt"), Suite::RIG)?;
    let mut packages = apt.closure(&PACKAGES)?;
    packages.retain(|name| {
        PACKAGES.contains(&name.as_str())
            || !(name.ends_with("-dev") || UNUSED.iter().any(|unused| name.starts_with(unused)))
    });
    for package in apt.download(&packages)? {
        unpack(&package, root)?;
        fs::remove_file(&package)?;
    }
    wrap_programs(prefix)?;
    borrow_tools(prefix)?;
    for target in [X86_64, AARCH64] {
        build_core(prefix, target)?;
    }
    Ok(())
}

/// Unpacks a package; of the compiler's sources only the standard library's are wanted.
fn unpack(package: &Path, root: &Path) -> Result<()> {
    let name = package.file_name().unwrap_or_default().to_string_lossy();
    let which = match name.starts_with("rust-web-src") {
        true => "--wildcards './usr/src/rustc-*/library/*' './usr/lib/*'",
        false => "--exclude='./usr/share/*'",
    };
    let script = format!("dpkg-deb --fsys-tarfile \"$1\" | tar -x -C \"$2\" {which}");
    shell::output(Command::new("sh").args(["-c", &script, "unpack"]).arg(package).arg(root))
        .map(drop)
}

/// Debian's programs look for their libraries in the system's folders only.
fn wrap_programs(prefix: &Path) -> Result<()> {
    let real = prefix.join("libexec");
    fs::create_dir_all(&real)?;
    for name in ["rustc", "rustdoc", "clippy-driver", "cargo-clippy"] {
        let program = prefix.join("bin").join(name);
        fs::rename(&program, real.join(name)).with_context(|| format!("no {name}"))?;
        fs::write(
            &program,
            format!(
                "#!/bin/sh\n\
                 # Runs {name} with the libraries that lie beside it.\n\
                 prefix=$(dirname \"$(dirname \"$(readlink -f \"$0\")\")\")\n\
                 folders=$prefix/lib/x86_64-linux-gnu:$prefix/../lib/x86_64-linux-gnu\n\
                 export LD_LIBRARY_PATH=\"$folders${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\"\n\
                 exec \"$prefix/libexec/{name}\" \"$@\"\n"
            ),
        )?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Cargo and the linker are the active toolchain's: Debian's cargo wants an old library, and
/// links, not copies, as the linker finds its own libraries by where it lies.
fn borrow_tools(prefix: &Path) -> Result<()> {
    let sysroot = shell::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let sysroot = Path::new(sysroot.trim());
    let tools = "lib/rustlib/x86_64-unknown-linux-gnu/bin";
    fs::create_dir_all(prefix.join(tools))?;
    for name in [
        "bin/cargo",
        "bin/rustfmt",
        "bin/cargo-fmt",
        &format!("{tools}/rust-lld"),
        &format!("{tools}/gcc-ld"),
    ] {
        let link = prefix.join(name);
        let _ = fs::remove_file(&link);
        symlink(sysroot.join(name), &link).with_context(|| format!("cannot link {name}"))?;
    }
    Ok(())
}

/// Builds `core` and `alloc` into the toolchain, so that no later build needs anything unstable.
fn build_core(prefix: &Path, target: &str) -> Result<()> {
    say(format!("building core and alloc for {target}"));
    let folder = project::rig().join("core");
    stamp::fresh(&folder)?;
    fs::create_dir(folder.join("src"))?;
    fs::write(
        folder.join("Cargo.toml"),
        "[package]\nname = \"stub\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[workspace]\n\n\
         [profile.release]\npanic = \"abort\"\n",
    )?;
    fs::write(folder.join("src/lib.rs"), "#![no_std]\nextern crate alloc;\n")?;
    let vendor = fs::canonicalize(prefix.join("lib/rustlib/src/rust/library/vendor"))
        .context("the standard library's sources lack their vendored crates")?;
    let mut cargo = Command::new(prefix.join("bin/cargo"));
    cargo
        .current_dir(&folder)
        .env("RUSTC", prefix.join("bin/rustc"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_TARGET_DIR")
        .args(["build", "--quiet", "--offline", "--release", "--target", target])
        .args(["--config", "source.crates-io.replace-with=\"vendored\"", "--config"])
        .arg(format!("source.vendored.directory=\"{}\"", vendor.display()))
        .arg("-Zbuild-std=core,alloc,compiler_builtins")
        .arg("-Zbuild-std-features=compiler-builtins-mem");
    shell::output(&mut cargo)?;
    let into = libraries(prefix, target);
    stamp::fresh(&into)?;
    for entry in fs::read_dir(folder.join("target").join(target).join("release/deps"))? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let wanted = ["libcore-", "liballoc-", "libcompiler_builtins-"];
        if text.ends_with(".rlib") && wanted.iter().any(|prefix| text.starts_with(prefix)) {
            fs::copy(entry.path(), into.join(&name))?;
        }
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}
