//! Everything around the device.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use pvblk_daemon::backing::{Backing, DiskOrigin, NbdDurability, NbdLedger};
use pvblk_daemon::folder::Folder;
use pvblk_daemon::http::{Address, Listener};
use pvblk_daemon::limit::Limiter;
use pvblk_daemon::mapped::{LedgerFile, MappedFile, Origin};
use pvblk_daemon::sandbox::{self, User};
use pvblk_daemon::size::Size;
use pvblk_daemon::source::{MemorySource, Source};
use pvblk_daemon::{logging, notify, socket};
use pvblk_stores::nbd::Past;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use virtio_blk_device::config::Settings;
use virtio_blk_device::vhost_user::Server;

use crate::cli::{Cli, folder};
use crate::disk::Served;
use crate::file;

/// Does what the command line, `words`, says: serves the disk until a signal, or looks for mistakes.
///
/// # Errors
///
/// If the daemon cannot begin. Once it has, nothing is an error that ends it.
pub fn run(words: &[OsString]) -> Result<()> {
    let (cli, file) = file::read(words)?;
    let (settings, source) = (cli.settings()?, cli.source()?);
    cli.store(DiskOrigin::New).check(&source)?;
    let metrics = cli.metrics.as_deref().map(str::parse::<Address>).transpose()?;
    let user = cli.user.as_deref().map(User::find).transpose()?;
    if cli.no_sandbox && user.is_some() {
        bail!("--user makes no sense with --no-sandbox");
    }
    if cli.check {
        println!("no mistake");
        return Ok(());
    }
    logging::start(cli.log, cli.log_level);
    let reload = Reload { words: words.to_vec(), file };
    serve(&cli, &source, settings, (metrics, user), reload)
}

fn serve(
    cli: &Cli,
    source: &Source,
    mut settings: Settings,
    (metrics, user): (Option<Address>, Option<User>),
    reload: Reload,
) -> Result<()> {
    // What takes privileges.
    raise_file_limit();
    // A socket that was left there is one of an earlier process, whose guest comes back.
    let origin = match fs::symlink_metadata(&cli.socket) {
        Ok(_) => DiskOrigin::InUse,
        Err(_) => DiskOrigin::New,
    };
    let listener = socket::listen(&cli.socket, cli.socket_mode, user.as_ref())?;
    let metrics = metrics.as_ref().map(Listener::open).transpose()?;
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signals")?;

    // Before there are other threads: they have what this one has.
    if !cli.no_sandbox {
        sandbox::drop_privileges(user.as_ref())?;
        sandbox::filter_system_calls()?;
    }

    // As what it is now: it must be able to open it again and again.
    let backing = open(cli, source, origin).inspect_err(|_| {
        if origin == DiskOrigin::New {
            // It would tell the next process of a guest that there never was.
            let _ = fs::remove_file(&cli.socket);
        }
    })?;
    if let Some(words) = backing.weakness() {
        log::warn!("{words}");
    }
    let serial = cli.serial(source)?;
    let geometry = backing.geometry();
    if let Some(most) = backing.max_queues().filter(|most| *most < settings.queues) {
        log::warn!("{most} queues are offered: give QEMU's device num-queues={most}");
        settings.queues = most;
    }
    let limiter = Arc::<Limiter>::default();
    limiter.set(cli.limits());
    let disk = Served::new(backing, origin, settings.queues, &serial, limiter);
    let server = Server::new(disk.clone(), settings)?;
    end_by_signal(signals, server.clone(), disk.clone(), reload)?;
    if let Some(metrics) = metrics {
        start("metrics", move || metrics.serve(|| disk.metrics()))?;
    }
    log::info!(
        "{source}: {} sectors, logical ones of {} bytes{}, serial number {serial}, at {}",
        geometry.sectors,
        geometry.logical_bytes,
        if geometry.read_only { ", read-only" } else { "" },
        cli.socket.display()
    );
    notify::ready();
    let result = serve_all(&server, &listener);
    notify::stopping();
    if !matches!(result, Ok(Ending::Connected)) {
        let _ = fs::remove_file(&cli.socket);
    }
    result.map(drop)
}

/// How it ended.
enum Ending {
    /// No virtual machine is connected.
    Idle,
    /// One is: it waits for the next process, which finds the socket.
    Connected,
}

/// Serves one virtual machine after the other.
fn serve_all(
    server: &Server<Served>,
    listener: &std::os::unix::net::UnixListener,
) -> Result<Ending> {
    while let Some(stream) = server.accept(listener).context("no more virtual machines")? {
        log::info!("a virtual machine has connected");
        match server.serve(stream) {
            Ok(true) => log::info!("the virtual machine has gone"),
            Ok(false) => return Ok(Ending::Connected),
            Err(error) => log::error!("the virtual machine is disconnected: {error}"),
        }
    }
    Ok(Ending::Idle)
}

fn open(cli: &Cli, source: &Source, origin: DiskOrigin) -> Result<Backing> {
    let options = cli.store(origin);
    let memory = |memory: &MemorySource| {
        let (size, file) = (memory.size, cli.memory_file());
        let geometry = options.memory(size)?;
        let place = || format!("no {size} of memory in {}", folder(&file).display());
        let (opened, name) = place_of(&file).with_context(place)?;
        if opened.size_of(name).is_some_and(|there| !is_as_large(there, size)) {
            bail!(
                "{} is there with another size: remove it if it is not wanted any more",
                file.display()
            );
        }
        let (mapped, origin) =
            MappedFile::open(&opened, name, size.bytes(), true).with_context(place)?;
        if origin == Origin::Kept {
            log::info!("{}: as it was left", file.display());
        }
        Ok(Arc::new(mapped.into_disk(geometry)?))
    };
    Backing::open(source, &options, memory, || open_ledger(cli))
}

/// Opens the file with what a daemon before this one knew of the server. Nothing says whether QEMU's
/// guest is still the same; what was lost is reported to whichever there is.
/// The folder of a file beside the socket, and the file's name in it.
fn place_of(file: &Path) -> Result<(Folder, &str)> {
    let name = file.file_name().and_then(OsStr::to_str).context("the name of the socket")?;
    Ok((Folder::open(folder(file))?, name))
}

fn open_ledger(cli: &Cli) -> Result<NbdLedger> {
    let file = cli.ledger_file();
    let opened = place_of(&file)
        .and_then(|(folder, name)| Ok(MappedFile::open(&folder, name, LedgerFile::BYTES, true)?));
    let memory = match opened {
        Ok((mapped, _)) => Some(mapped.into()),
        Err(error) if cli.store.nbd_durability.is_none_or(|it| it == NbdDurability::Reported) => {
            bail!(
                "cannot write down in {} what the server may lose: {error}; put the socket into a \
                 folder where this user may make files, or choose another --nbd-durability",
                file.display()
            );
        }
        Err(_) => None,
    };
    Ok(NbdLedger { memory, past: Past::Recorded })
}

/// Whether a file of so many bytes is one of that size, rounded up to pages.
fn is_as_large(bytes: u64, size: Size) -> bool {
    bytes == size.bytes().next_multiple_of(pvblk::memory::PAGE_BYTES as u64)
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let builder = thread::Builder::new().name(name.into());
    builder.spawn(work).with_context(|| format!("no thread for {name}"))?;
    Ok(())
}

/// The first signal asks the daemon to end, the second one ends it.
fn end_by_signal(
    mut signals: Signals,
    server: Server<Served>,
    disk: Served,
    mut reload: Reload,
) -> Result<()> {
    start("signals", move || {
        let mut is_ending = false;
        for signal in &mut signals {
            if signal == SIGHUP {
                reload.again(&disk);
                refresh(&server, &disk);
            } else if is_ending {
                log::warn!("ending at once, with requests in progress");
                std::process::exit(1);
            } else {
                is_ending = true;
                server.end();
            }
        }
    })
}

/// What it takes to read the configuration again.
struct Reload {
    words: Vec<OsString>,
    /// What the file has said so far.
    file: file::Settings,
}

impl Reload {
    /// Reads the file again. What a guest that runs cannot be given is said.
    fn again(&mut self, disk: &Served) {
        let result = file::reread(&self.words);
        let (cli, file) = match result.and_then(|it| it.0.settings().map(|_| it)) {
            Ok(read) => read,
            Err(error) => return log::error!("the configuration stays as it was: {error:#}"),
        };
        for name in file::differences(&self.file, &file) {
            match name {
                "log-level" => log::set_max_level(cli.log_level),
                "iops" | "bps" | "burst" => disk.limiter().set(cli.limits()),
                _ => log::warn!("{name} has changed: that counts when the daemon is started again"),
            }
        }
        self.file = file;
        log::info!("the configuration was read again");
    }
}

/// Looks how large the disk is now, and tells the guest.
fn refresh(server: &Server<Served>, disk: &Served) {
    let result = disk.backing().resize(None).and_then(|geometry| {
        server.refresh().context("the virtual machine does not hear of it")?;
        Ok(geometry)
    });
    match result {
        Ok(geometry) => log::info!("the disk has {} sectors", geometry.sectors),
        Err(error) => log::error!("the disk's size: {error:#}"),
    }
}

/// Every queue takes about six file descriptors, and every region of the guest's memory one.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // What cannot be had is told when it is missing.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
