//! `cargo xtask bench`: measurements beside our peers.

pub mod engines;
pub mod fio;

mod profile;
mod results;
mod text;
mod vhost_user;
mod xen;

use anyhow::{Result, anyhow};
use clap::ValueEnum;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// The bench; all of them when absent
    #[arg(value_enum)]
    name: Option<Bench>,
    /// For `xen`: show which functions our guest's instructions are in
    #[arg(long)]
    profile: bool,
    /// For `xen`: only our guest, without the peer
    #[arg(long)]
    ours_only: bool,
    /// For `xen`, `xen-back` and `vhost-user`: only this load, such as `4k-randread-qd32`
    #[arg(long)]
    load: Option<String>,
    /// For `xen`: more words for our guest's command line
    #[arg(long, default_value = "")]
    cmdline: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Bench {
    /// Instructions a request of the backend's engine
    Backend,
    /// Instructions a request of the frontend's engine
    Frontend,
    /// Drivers on real Xen, in deterministic virtual time: ours and Linux's on Linux's backend
    Xen,
    /// Backends on real Xen, in deterministic virtual time: ours, Linux's and QEMU's
    XenBack,
    /// Many disks of one daemon, on real Xen: what they cost each other, and memory
    XenDisks,
    /// Instructions a request of our VirtIO driver and device, beside their peers
    VirtioPeers,
    /// A driver and a device in two threads: requests a second, beside the peers
    Threads,
    /// A Linux guest on `vhost-user-blkd`, beside `qemu-storage-daemon`
    VhostUser,
}

/// Runs one bench, or all.
pub fn bench(options: &Options) -> Result<()> {
    let run = |bench| match bench {
        Bench::Backend => engines::run("backend"),
        Bench::Frontend => engines::run("frontend"),
        Bench::Xen => xen::run_front(options),
        Bench::XenBack => xen::run_back(options),
        Bench::XenDisks => xen::run_disks(),
        Bench::VirtioPeers => engines::run("virtio_peers"),
        Bench::Threads => engines::run_threads(),
        Bench::VhostUser => vhost_user::run(options),
    };
    if let Some(bench) = options.name {
        return run(bench);
    }
    // One that fails does not keep the others from being run.
    let mut outcome = Ok(());
    for bench in [
        Bench::Frontend,
        Bench::Backend,
        Bench::VirtioPeers,
        Bench::Threads,
        Bench::VhostUser,
        Bench::Xen,
        Bench::XenBack,
        Bench::XenDisks,
    ] {
        if let Err(error) = run(bench) {
            eprintln!("error: {error:#}");
            outcome = Err(anyhow!("not every bench has a result"));
        }
    }
    outcome
}
