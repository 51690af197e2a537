//! `cargo xtask run`: one guest on real Xen, its console, a verdict.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::guests::Guest;
use crate::guests::case::Case;
use crate::matrix::{self, Back};
use crate::rig::{Machine, Rig};
use crate::{driver_domain, foreign, vhost_user, virtio};

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// The guest: `unikernel` (ours), `linux` (the same checks by Linux's own driver), or
    /// `foreign` (two guests that share pages); or the backend: `pvblkd`, for a Linux guest to use,
    /// `driver-domain`, for several guests at once, `vhost-user-blkd`, for a Linux guest without Xen
    #[arg(default_value = "unikernel")]
    example: String,
    /// A PVH image of one's own in the unikernel's place
    #[arg(long)]
    image: Option<PathBuf>,
    /// Build with `defmt` for messages
    #[arg(long)]
    defmt: bool,
    /// The machine to emulate
    #[arg(long, default_value = "x86_64")]
    arch: String,
    /// The wire of the unikernel's disks: Xen's, or VirtIO's in QEMU without Xen
    #[arg(long, value_enum, default_value_t = Wire::Xen)]
    wire: Wire,
    /// With `--wire virtio`: only this machine
    #[arg(long, value_enum)]
    machine: Option<Machine>,
    /// With `--wire virtio`: only packed queues
    #[arg(long)]
    packed: bool,
    /// Words for the guest's command line
    #[arg(long, default_value = "")]
    cmdline: String,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Wire {
    Xen,
    Virtio,
}

/// Boots Xen with the guest; or the guest alone.
pub fn run(options: &Options) -> Result<()> {
    if options.arch != "x86_64" {
        bail!("only x86_64 so far, not {}", options.arch);
    }
    if options.wire == Wire::Virtio {
        if options.example != "unikernel" || options.image.is_some() {
            bail!("with `--wire virtio` there is our unikernel, and nothing else");
        }
        let packed = options.packed.then_some(true);
        virtio::run(options.machine, packed, options.defmt, &options.cmdline).context("FAIL")?;
        println!("PASS: every file and the disk are as they must be, on every machine and queue");
        return Ok(());
    }
    if options.machine.is_some() || options.packed {
        bail!("`--machine` and `--packed` are for `--wire virtio`");
    }
    let rig = Rig::prepare()?;
    if options.example == "foreign" {
        foreign::run(&rig, true).context("FAIL")?;
        println!("PASS: pages of one guest were mapped and copied by another");
        return Ok(());
    }
    if options.example == "driver-domain" {
        driver_domain::run(&rig, true).context("FAIL")?;
        println!(
            "PASS: several guests' disks are as they must be; one was destroyed; 512 MiB were \
             outstanding on one ring page"
        );
        return Ok(());
    }
    if options.example == "vhost-user-blkd" {
        vhost_user::run(&rig, true).context("FAIL")?;
        println!(
            "PASS: split and packed queues; nothing was lost when the daemon was killed; a Linux \
             guest's file system and disk are as they must be, from both sides"
        );
        return Ok(());
    }
    if options.example == "pvblkd" {
        matrix::show(&rig, Back::PvblkdFile).context("FAIL")?;
        println!("PASS: a Linux guest's file system and disk are as they must be, from both sides");
        return Ok(());
    }
    let guest = match (options.example.as_str(), &options.image) {
        ("unikernel", Some(image)) => Guest::image(&rig, image.clone())?,
        ("unikernel", None) if options.defmt => Guest::unikernel(&rig, &["defmt"])?,
        ("unikernel", None) => Guest::unikernel(&rig, &[])?,
        ("linux", None) => Guest::linux(&rig)?,
        (other, _) => bail!(
            "there is no example {other}: `unikernel`, `linux`, `foreign`, `pvblkd`, \
             `driver-domain` or `vhost-user-blkd`"
        ),
    };
    let case = Case { arguments: options.cmdline.clone(), ..Case::plain(&options.example) };
    let result = guest.run_one(&case, true);
    println!();
    result.context("FAIL")?;
    println!("PASS: every file and the disk are as they must be, seen from both sides");
    Ok(())
}
