//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{LogFormat, ServeVbd};
use crate::options::{DiskOptions, ImageFormat, NbdDurability, Path as DataPath};
use crate::size::Size;
use crate::source::MemorySource;
use crate::vdev::VirtualDevice;

/// Serves disks to Xen guests: from files, block devices, memory and NBD servers.
#[derive(Debug, Parser)]
#[command(
    name = "pvblkd",
    version,
    after_help = "\
Two ways to give a guest a disk:

  Where xen-blkback is not loaded, `pvblkd serve` owns backend/vbd, and guests' configurations say
      disk = [ 'phy:/dev/vg/web,xvda,w' ]
      disk = [ 'format=raw,vdev=xvda,access=rw,script=block-pvblkd,target=/srv/web.img' ]
  where the target may also be memory:64M, memory:NAME:64M or nbd://host/export.

  Beside a loaded xen-blkback, for a guest that runs:
      pvblkd attach web xvdb --file /srv/web.img"
)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve disks until SIGTERM (the daemon)
    Serve(Serve),
    /// Look for mistakes in a configuration file
    Check(Check),
    /// Give a running guest a disk
    Attach(Attach),
    /// Take a disk of `attach` away from its guest
    Detach(Detach),
    /// Give a disk another size, or tell the guest that its file has another size
    Resize(Resize),
    /// Limit what a disk does in a second, or show its limits
    Limit(Limit),
    /// Show all disks that are served
    List(List),
    /// Show all disks, again and again
    Top(Top),
}

/// The daemon.
#[derive(Debug, Args)]
#[command(after_help = "\
The daemon runs until SIGTERM. It answers what is in progress, for 10 s at most, and leaves connected
disks as they are: guests wait for them, and go on when it is started again, as after `kill -9`. A guest
that is connected gets the disk that it had, or waits until that is back (`pvblkd list` says why). To end a disk, take it from its guest first (`pvblkd
detach`, `xl block-detach`).")]
pub struct Serve {
    /// Read settings from this file (TOML); what is said here counts more
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Show counters to Prometheus: 127.0.0.1:9470, or unix:/PATH
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// Pin each worker to a processor, in turn
    #[arg(long)]
    pub pin: bool,
    /// How messages look [default: text]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log: Option<LogFormat>,
    /// Messages of this level and above: error, warn, info, debug [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<log::LevelFilter>,
    /// Become this user; it must be allowed to open /dev/xen/* and the disks
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Keep root's capabilities and all system calls
    #[arg(long)]
    pub no_sandbox: bool,
    /// Whether to serve backend/vbd, which is xen-blkback's if that is loaded [default: auto]
    #[arg(long, value_enum, value_name = "WHEN")]
    pub vbd: Option<ServeVbd>,
    /// See below
    #[command(flatten)]
    pub place: Place,
    /// Settings of all disks that say nothing else
    #[command(flatten)]
    pub disk: DiskArgs,
}

/// Looks for mistakes in a configuration file.
#[derive(Debug, Args)]
#[command(after_help = "\
Every mistake is shown, with its line. Neither Xen nor a daemon is needed. It ends with 0 if `pvblkd serve
--config FILE` takes the file, and with 1 if not.")]
pub struct Check {
    /// The file
    #[arg(default_value = CONFIG)]
    pub file: PathBuf,
}

/// Where the configuration file is.
const CONFIG: &str = "/etc/xen/pvblkd.toml";

/// Where the daemon is found.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// The daemon's folder, on a tmpfs [default: /run/pvblkd]
    #[arg(long, value_name = "FOLDER")]
    pub runtime: Option<PathBuf>,
}

/// Where the daemon is found unless something else is said.
pub const RUNTIME: &str = "/run/pvblkd";

impl Place {
    /// The folder.
    pub fn folder(&self) -> PathBuf {
        self.runtime.clone().unwrap_or_else(|| RUNTIME.into())
    }
}

/// How a disk is served.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Disk settings")]
pub struct DiskArgs {
    /// The guest may not write
    #[arg(long)]
    pub read_only: bool,
    /// The logical sector: 512, 1024, 2048 or 4096 [default: 512, or the device's]
    #[arg(long, value_name = "BYTES")]
    pub sector: Option<u32>,
    /// The most queues, each with a worker: 1 to 64 [default: 4; 1 for NBD]
    #[arg(long, value_name = "COUNT")]
    pub queues: Option<u32>,
    /// The most pages of a ring, as a power of two: 0 to 4 [default: 4]
    #[arg(long, value_name = "ORDER")]
    pub ring_order: Option<u32>,
    /// The most segments of 4 KiB in one request: 0 to 4096 [default: 256]
    #[arg(long, value_name = "COUNT")]
    pub segments: Option<u32>,
    /// Do not keep the guest's pages mapped
    #[arg(long)]
    pub no_persistent: bool,
    /// Map pages for each request that are not kept mapped; else Xen copies
    #[arg(long)]
    pub map: bool,
    /// Read and write files through the page cache of this domain
    #[arg(long)]
    pub buffered: bool,
    /// Read and write files without io_uring
    #[arg(long)]
    pub synchronous: bool,
    /// Let others use the file at the same time that say the same: QEMU with share-rw=on, another disk
    /// with --share. For guests that expect that, with a file system for clusters
    #[arg(long)]
    pub share: bool,
    /// What the file is, even if it looks like an image of another format
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<ImageFormat>,
    /// What to do about writes that an NBD server may lose when it is restarted [default: reported]
    #[arg(long, value_enum, value_name = "HOW")]
    pub nbd_durability: Option<NbdDurability>,
    /// The most requests in a second, 0 for no limit [default: 0]
    #[arg(long, value_name = "COUNT")]
    pub iops: Option<u64>,
    /// The most bytes in a second, read and written, 0 for no limit: 50M [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub bps: Option<u64>,
    /// How long what these two allow may be saved up for later: 0 to 60000 [default: 100]
    #[arg(long, value_name = "MILLISECONDS")]
    pub burst: Option<u64>,
    /// Refuse an NBD server that can make no write durable
    #[arg(long)]
    pub require_flush: bool,
    /// How long an NBD server may be at work on a write whose connection is gone, or that a daemon
    /// that was killed had begun: nothing is sent before that is over [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub nbd_settle: Option<u32>,
}

impl DiskArgs {
    /// As settings. What is not said is not set.
    pub fn options(&self) -> DiskOptions {
        let said = |flag: bool| flag.then_some(true);
        DiskOptions {
            read_only: said(self.read_only),
            sector: self.sector,
            queues: self.queues,
            ring_order: self.ring_order,
            segments: self.segments,
            persistent: self.no_persistent.then_some(false),
            data_path: self.map.then_some(DataPath::Map),
            buffered: said(self.buffered),
            synchronous: said(self.synchronous),
            share: said(self.share),
            format: self.format,
            nbd_durability: self.nbd_durability,
            iops: self.iops,
            bps: self.bps,
            burst: self.burst,
            require_flush: said(self.require_flush),
            nbd_settle: self.nbd_settle,
        }
    }
}

/// What a disk is to be served from.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SourceArgs {
    /// A file or block device
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Memory of this size, of zeroes at first; it is gone when the disk is. With a name before the
    /// size, it stays, and several disks may share it
    #[arg(long, value_name = "[NAME:]SIZE")]
    pub memory: Option<MemorySource>,
    /// A disk on an NBD server: `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`
    #[arg(long, value_name = "URL")]
    pub nbd: Option<String>,
}

/// Gives a guest a disk.
#[derive(Debug, Args)]
pub struct Attach {
    /// The guest: its name or number
    pub domain: String,
    /// The disk's name in the guest: xvdb
    pub disk: VirtualDevice,
    /// What it is served from
    #[command(flatten)]
    pub source: SourceArgs,
    /// How it is served
    #[command(flatten)]
    pub options: DiskArgs,
    /// Do not wait for the guest: it is enough that the daemon has opened the disk
    #[arg(long)]
    pub no_wait: bool,
    /// Wait so long for the daemon and the guest
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
}

/// Takes a disk away.
#[derive(Debug, Args)]
pub struct Detach {
    /// The guest: its name or number
    pub domain: String,
    /// The disk's name in the guest
    pub disk: VirtualDevice,
    /// Do not ask the guest: its disk is gone
    #[arg(long)]
    pub force: bool,
    /// Wait so long for the guest
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
}

/// Gives a disk another size.
#[derive(Debug, Args)]
pub struct Resize {
    /// The guest: its name or number
    pub domain: String,
    /// The disk's name in the guest
    pub disk: VirtualDevice,
    /// The size; without one, that which the file or device has now
    pub size: Option<Size>,
    /// Where the daemon is
    #[command(flatten)]
    pub place: Place,
}

/// Limits a disk.
#[derive(Debug, Args)]
#[command(after_help = "\
What is not said stays as it is. It holds until the disk is detached, or the daemon is started again: what is
to last is said in the configuration (iops, bps, burst), or to `pvblkd attach`. All queues of the disk
together may do so much; each that wants something has an equal share.")]
pub struct Limit {
    /// The guest: its name or number
    pub domain: String,
    /// The disk's name in the guest
    pub disk: VirtualDevice,
    /// The most requests in a second; 0 for no limit
    #[arg(long, value_name = "COUNT")]
    pub iops: Option<u64>,
    /// The most bytes in a second, read and written: 50M; 0 for no limit
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub bps: Option<u64>,
    /// How long what these two allow may be saved up for later
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u64).range(..=60_000))]
    pub burst: Option<u64>,
    /// Where the daemon is
    #[command(flatten)]
    pub place: Place,
}

/// Bytes, with one of the letters that sizes have.
fn bytes(text: &str) -> Result<u64, String> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    text.parse::<Size>()
        .map(Size::bytes)
        .map_err(|_| "a number is expected, or one with K, M, G".into())
}

/// Shows all disks, again and again.
#[derive(Debug, Args)]
pub struct Top {
    /// How long each picture stays
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    pub interval: f64,
    /// End after so many
    #[arg(long, value_name = "COUNT")]
    pub count: Option<u64>,
    /// Where the daemon is
    #[command(flatten)]
    pub place: Place,
}

/// Shows all disks.
#[derive(Debug, Args)]
pub struct List {
    /// Write an array of objects, with counters since the start
    #[arg(long)]
    pub json: bool,
    /// Show how long requests took: half of them, 99 of 100, all of them
    #[arg(long)]
    pub latency: bool,
    /// Count for so long what is done per second; 0 for the time since the start of the counters
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// Where the daemon is
    #[command(flatten)]
    pub place: Place,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        let words = std::iter::once("pvblkd").chain(line.split_whitespace());
        Cli::try_parse_from(words).map(|cli| cli.command).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn attach_says_everything() {
        let line = "attach web xvdb --memory 64M --read-only --sector 4096 --queues 2 --map \
                    --segments 4096 --ring-order 0 --no-persistent --buffered --synchronous \
                    --share --format raw --nbd-durability trusted --nbd-settle 9 --require-flush \
                    --iops 100 --bps 1M --burst 50";
        let Ok(Command::Attach(attach)) = parse(line) else { panic!() };
        assert_eq!((&*attach.domain, attach.disk.0), ("web", 51728));
        assert_eq!(attach.source.memory.unwrap().to_string(), "memory:64M");
        let options = attach.options.options();
        assert_eq!(
            options,
            DiskOptions {
                read_only: Some(true),
                sector: Some(4096),
                queues: Some(2),
                ring_order: Some(0),
                segments: Some(4096),
                persistent: Some(false),
                data_path: Some(DataPath::Map),
                buffered: Some(true),
                synchronous: Some(true),
                share: Some(true),
                format: Some(ImageFormat::Raw),
                nbd_durability: Some(NbdDurability::Trusted),
                iops: Some(100),
                bps: Some(1 << 20),
                burst: Some(50),
                require_flush: Some(true),
                nbd_settle: Some(9),
            }
        );
        let Ok(Command::Attach(attach)) = parse("attach 3 xvda --file x") else { panic!() };
        assert_eq!(attach.options.options(), DiskOptions::default());
    }

    #[test]
    fn mistakes_are_named() {
        for (line, words) in [
            ("attach web xvdb", "--file"),
            ("attach web xvdb --file x --memory 1M", "cannot be used with"),
            ("attach web vdb --file x", "is not a disk of a guest"),
            ("attach web xvdb --memory 1.5G", "not the size of a disk"),
            ("resize web xvdb lots", "not the size of a disk"),
            ("serve --log xml", "possible values"),
            ("attach web xvdb --file x --format qcow2", "possible values"),
            ("explode", "unrecognized subcommand"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(words), "{line}: {error}");
        }
    }
}
