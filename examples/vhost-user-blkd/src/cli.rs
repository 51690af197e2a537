//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, Parser};
use pvblk_daemon::backing::{DiskOrigin, ImageFormat, NbdDurability, StoreOptions};
use pvblk_daemon::identity::serial;
use pvblk_daemon::limit::{BURST, Limits};
use pvblk_daemon::logging::LogFormat;
use pvblk_daemon::size::Size;
use pvblk_daemon::source::{MemorySource, Source};
use pvblk_virtio::block::ID_BYTES;
use virtio_blk_device::config::{QUEUE_SIZE_MAX, Settings};

/// Serves a disk to a virtual machine over vhost-user: from a file, a block device, memory or an NBD
/// server.
#[derive(Debug, Parser)]
#[command(
    name = "vhost-user-blkd",
    version,
    after_help = "\
QEMU's side of it (the guest's memory must be shared):

  qemu-system-x86_64 -m 4G \\
      -object memory-backend-memfd,id=ram,size=4G,share=on -machine memory-backend=ram \\
      -chardev socket,id=disk,path=PATH,reconnect=1 \\
      -device vhost-user-blk-pci,chardev=disk,num-queues=4

With reconnect=1 this daemon may be ended, or killed, and started again while the guest runs: its
requests wait, and none is lost. SIGTERM ends it when everything that was begun is done; SIGHUP has it
read its configuration again, look how large its file is now, and tell the guest."
)]
pub struct Cli {
    /// Read options from this file (TOML: `queues = 4`); what is said here counts more
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Look for mistakes in the options and the file, and end: with 1 if there are some
    #[arg(long)]
    pub check: bool,
    /// Wait for the virtual machine at this socket
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Who may connect to the socket, besides its owner: its permissions in octal
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = mode)]
    pub socket_mode: u32,
    /// What the disk is served from
    #[command(flatten)]
    pub source: SourceArgs,
    /// What the guest sees
    #[command(flatten)]
    pub device: DeviceArgs,
    /// How data is read and written
    #[command(flatten)]
    pub store: StoreArgs,
    /// Show counters to Prometheus: 127.0.0.1:9471, or unix:/PATH
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// How messages look
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub log: LogFormat,
    /// Messages of this level and above: error, warn, info, debug
    #[arg(long, value_name = "LEVEL", default_value_t = log::LevelFilter::Info)]
    pub log_level: log::LevelFilter,
    /// Become this user; it must be allowed to open the disk
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Keep root's capabilities and all system calls
    #[arg(long)]
    pub no_sandbox: bool,
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "permissions in octal are expected, such as 660".into())
}

/// What a disk is served from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SourceArgs {
    /// A file or block device
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Memory of this size, of zeroes at first. It is in a file beside the socket, PATH.memory, and
    /// stays until that is removed
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// A disk on an NBD server: `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`. What the
    /// server may lose is written down in a file beside the socket, PATH.ledger
    #[arg(long, value_name = "URL")]
    pub nbd: Option<String>,
}

/// What the guest sees.
#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// The guest may not write
    #[arg(long)]
    pub read_only: bool,
    /// The logical sector: 512, 1024, 2048 or 4096 [default: 512, or the device's]
    #[arg(long, value_name = "BYTES")]
    pub sector: Option<u32>,
    /// The most queues, each with a thread: 1 to 64; not more than an NBD server allows connections
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub queues: u16,
    /// The most descriptors in a queue, a power of two: 4 to 32768
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    pub queue_size: u16,
    /// The most segments in a request: two less than the descriptors that QEMU's queues have
    /// (queue-size=), but at most two less than --queue-size [default: 126, or that if it is less]
    #[arg(long, value_name = "COUNT")]
    pub segments: Option<u16>,
    /// Offer packed queues
    #[arg(long)]
    pub packed: bool,
    /// Have every write durable before it is done, until the guest wants a write cache
    #[arg(long)]
    pub write_through: bool,
    /// Look so long for the next request before sleeping, if there were some lately. The guest has its
    /// answers sooner, and the host less processor time for others; 0 to sleep at once
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    pub poll: u32,
    /// When a queue is to stop, wait so long for requests that the disk has not done; then they fail.
    /// QEMU stands still meanwhile. 0 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stop_within: u32,
    /// The disk's serial number: up to 20 bytes [default: another one for each disk, always the same]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,
}

/// How data is read and written.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub struct StoreArgs {
    /// Read and write files through the host's page cache
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
    /// The most requests in a second, of all queues; 0 for no limit
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub iops: u64,
    /// The most bytes in a second, read and written; 0 for no limit
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub bps: u64,
    /// How long what these two allow may be saved up for later
    #[arg(long, value_name = "MILLISECONDS", default_value_t = BURST,
        value_parser = clap::value_parser!(u64).range(..=60_000))]
    pub burst: u64,
    /// Refuse an NBD server that can make no write durable
    #[arg(long)]
    pub require_flush: bool,
    /// How long an NBD server may be at work on a write whose connection is gone, or that a daemon
    /// that was killed had begun: nothing is sent before that is over [default: 5]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=3600))]
    pub nbd_settle: Option<u32>,
}

impl Cli {
    /// What the disk is served from.
    ///
    /// # Errors
    ///
    /// If it is nothing that a disk can be served from.
    pub fn source(&self) -> Result<Source> {
        let SourceArgs { file, memory, nbd } = &self.source;
        match (file, memory, nbd) {
            (Some(path), ..) => Ok(Source::file(&std::env::current_dir()?, path)?),
            (_, Some(size), _) => Ok(Source::Memory(MemorySource { name: None, size: *size })),
            (_, _, Some(url)) => Ok(url.parse()?),
            _ => bail!("--file, --memory or --nbd is expected"),
        }
    }

    /// The disk's serial number.
    ///
    /// # Errors
    ///
    /// If the disk is not there any more.
    pub fn serial(&self, source: &Source) -> Result<String> {
        match (&self.device.serial, source) {
            (Some(serial), _) => Ok(serial.clone()),
            // It is a disk of its own at each socket.
            (None, Source::Memory(_)) => {
                Ok(serial(&std::path::absolute(self.memory_file())?.display().to_string()))
            }
            (None, _) => Ok(serial(&source.identity()?)),
        }
    }

    /// Where a disk in memory is.
    pub fn memory_file(&self) -> PathBuf {
        self.beside_socket(".memory")
    }

    /// Where it is written down what an NBD server may lose.
    pub fn ledger_file(&self) -> PathBuf {
        self.beside_socket(".ledger")
    }

    fn beside_socket(&self, extension: &str) -> PathBuf {
        let mut path = self.socket.clone().into_os_string();
        path.push(extension);
        path.into()
    }

    /// How data is read and written, of a disk that an earlier process may have served.
    pub fn store(&self, origin: DiskOrigin) -> StoreOptions {
        StoreOptions {
            read_only: self.device.read_only,
            sector: self.device.sector,
            buffered: self.store.buffered,
            synchronous: self.store.synchronous,
            share: self.store.share,
            format: self.store.format,
            nbd_durability: self.store.nbd_durability,
            origin,
            nbd_settle: self.store.nbd_settle,
            require_flush: self.store.require_flush,
            queues: self.device.queues,
        }
    }

    /// How much the disk may do.
    pub fn limits(&self) -> Limits {
        let StoreArgs { iops, bps, burst, .. } = self.store;
        Limits { iops, bps, burst }
    }

    /// How the device is set up.
    ///
    /// # Errors
    ///
    /// All numbers that cannot be.
    pub fn settings(&self) -> Result<Settings> {
        let DeviceArgs { sector, queues, queue_size, segments, serial, .. } = &self.device;
        let longest = queue_size.saturating_sub(2);
        let segments = segments.unwrap_or(longest.min(Settings::default().segments));
        let stop_within = self.device.stop_within;
        let sector_fits = sector.is_none_or(|it| matches!(it, 512 | 1024 | 2048 | 4096));
        let size_fits = (4..=QUEUE_SIZE_MAX).contains(queue_size) && queue_size.is_power_of_two();
        let mistakes: Vec<_> = [
            (sector_fits, "--sector: 512, 1024, 2048 or 4096 is expected".into()),
            ((1..=64).contains(queues), "--queues: 1 to 64 is expected".into()),
            (
                size_fits,
                format!("--queue-size: a power of two from 4 to {QUEUE_SIZE_MAX} is expected"),
            ),
            (
                !size_fits || (1..=longest).contains(&segments),
                format!(
                    "--segments: 1 to {longest} is expected with queues of {queue_size} descriptors"
                ),
            ),
            (stop_within <= 3600, "--stop-within: 0 to 3600 seconds are expected".into()),
            (
                serial.as_ref().is_none_or(|it| it.len() <= ID_BYTES),
                format!("--serial: at most {ID_BYTES} bytes are expected"),
            ),
        ]
        .into_iter()
        .filter_map(|(is_fine, words): (bool, String)| (!is_fine).then_some(words))
        .collect();
        if !mistakes.is_empty() {
            bail!("{}", mistakes.join("\n"));
        }
        let mut settings = Settings::default();
        settings.queues = *queues;
        settings.queue_size = *queue_size;
        settings.segments = segments;
        settings.packed = self.device.packed;
        settings.write_back = !self.device.write_through;
        settings.look_again = self.device.poll;
        settings.patience = stop_within * 1000;
        Ok(settings)
    }
}

/// The folder that a file is in.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, String> {
        let words = std::iter::once("vhost-user-blkd").chain(line.split_whitespace());
        Cli::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_can_be_said() {
        let cli = parse(
            "--socket /run/x --memory 64M --read-only --sector 4096 --queues 2 --queue-size 128 \
             --segments 32 --packed --write-through --serial abc --buffered --synchronous \
             --share --format raw --socket-mode 660 --stop-within 3",
        );
        let cli = cli.unwrap();
        let settings = cli.settings().unwrap();
        assert_eq!((settings.queues, settings.queue_size, settings.segments), (2, 128, 32));
        assert!(settings.packed && !settings.write_back);
        assert_eq!(settings.patience, 3000);
        assert_eq!(cli.socket_mode, 0o660);
        assert_eq!(cli.memory_file(), Path::new("/run/x.memory"));
        assert_eq!(cli.source().unwrap().to_string(), "memory:64M");
        let store = cli.store(DiskOrigin::New);
        assert!(store.read_only && store.buffered && store.synchronous && store.share);
        assert_eq!(store.format, Some(ImageFormat::Raw));
        let cli = parse("--socket x --file disk.img").unwrap();
        assert!(cli.source().unwrap().to_string().ends_with("/disk.img"));
        assert_eq!(cli.settings().unwrap(), {
            let mut settings = Settings::default();
            settings.queues = 4;
            settings
        });
        assert_eq!(
            (folder(&cli.socket), folder(Path::new("/a/b"))),
            (Path::new("."), Path::new("/a"))
        );
    }

    #[test]
    fn requests_are_no_longer_than_the_queues_of_qemu() {
        for (line, expected) in [
            ("", 126),
            ("--queue-size 1024", 126),
            ("--queue-size 128", 126),
            ("--queue-size 64", 62),
            ("--queue-size 4", 2),
            ("--queue-size 1024 --segments 1022", 1022),
        ] {
            let cli = parse(&format!("--socket x --memory 1M {line}")).unwrap();
            assert_eq!(cli.settings().unwrap().segments, expected, "{line}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, words) in [
            ("--socket x", "--file"),
            ("--file x", "--socket"),
            ("--socket x --file x --memory 1M", "cannot be used with"),
            ("--socket x --memory 1.5G", "not the size of a disk"),
            ("--socket x --memory 1M --socket-mode 999", "in octal"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(words), "{line}: {error}");
        }
        for (line, words) in [
            ("--sector 513", "--sector"),
            ("--queues 0", "--queues"),
            ("--queues 65", "--queues"),
            ("--queue-size 100", "--queue-size"),
            ("--queue-size 65535", "--queue-size"),
            ("--segments 255", "--segments"),
            ("--stop-within 3601", "--stop-within"),
            ("--serial 123456789012345678901", "--serial"),
        ] {
            let cli = parse(&format!("--socket x --memory 1M {line}")).unwrap();
            let error = cli.settings().unwrap_err().to_string();
            assert!(error.starts_with(words), "{line}: {error}");
        }
    }
}
