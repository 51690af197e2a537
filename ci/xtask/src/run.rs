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
    /// What is to run
    #[arg(value_enum, default_value_t = Example::Unikernel)]
    example: Example,
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
enum Example {
    /// A guest of ours: reads a file system, and uses a disk in every way
    Unikernel,
    /// A Linux guest, which does the same by Linux's own driver
    Linux,
    /// Two guests that share pages
    Foreign,
    /// Our daemon in dom0, with a Linux guest
    Pvblkd,
    /// Our driver domain, with several guests at once
    DriverDomain,
    /// Our daemon for QEMU, with a Linux guest, without Xen
    VhostUserBlkd,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Wire {
    Xen,
    Virtio,
}

/// Boots Xen with the guest; or the guest alone.
pub fn run(options: &Options) -> Result<()> {
    // What does not fit is said before anything is fetched.
    if options.arch != "x86_64" {
        bail!("only x86_64 so far, not {}", options.arch);
    }
    if options.example != Example::Unikernel && (options.image.is_some() || options.defmt) {
        bail!("`--image` and `--defmt` are for the unikernel");
    }
    if options.wire == Wire::Virtio {
        if options.example != Example::Unikernel || options.image.is_some() {
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
    let passed = match options.example {
        Example::Unikernel => {
            let guest = match &options.image {
                Some(image) => Guest::image(&rig, image.clone()),
                None => Guest::unikernel(&rig, if options.defmt { &["defmt"] } else { &[] }),
            };
            one_guest(&guest?, "unikernel", options)?
        }
        Example::Linux => one_guest(&Guest::linux(&rig)?, "linux", options)?,
        Example::Foreign => {
            foreign::run(&rig, true).context("FAIL")?;
            "pages of one guest were mapped and copied by another"
        }
        Example::Pvblkd => {
            matrix::show(&rig, Back::PvblkdFile).context("FAIL")?;
            "a Linux guest's file system and disk are as they must be, from both sides"
        }
        Example::DriverDomain => {
            driver_domain::run(&rig, true).context("FAIL")?;
            "several guests' disks are as they must be; one was destroyed; 512 MiB were outstanding \
             on one ring page"
        }
        Example::VhostUserBlkd => {
            vhost_user::run(&rig, true).context("FAIL")?;
            "split and packed queues; nothing was lost when the daemon was killed; a Linux guest's \
             file system and disk are as they must be, from both sides"
        }
    };
    println!("PASS: {passed}");
    Ok(())
}

/// Boots Xen with one guest, which is also what [`Case`] calls it.
fn one_guest(guest: &Guest<'_>, name: &str, options: &Options) -> Result<&'static str> {
    let case = Case { arguments: options.cmdline.clone(), ..Case::plain(name) };
    let result = guest.run_one(&case, true);
    println!();
    result.context("FAIL")?;
    Ok("every file and the disk are as they must be, seen from both sides")
}
