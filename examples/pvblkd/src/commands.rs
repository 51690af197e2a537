//! The commands that an administrator gives while the daemon runs.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pvblk_daemon::limit::Limits;
use pvblk_linux::Control;
use pvblk_xen::store::Store;

use crate::cli::{Attach, Check, Detach, Limit, List, Resize, SourceArgs, Top};
use crate::config::Config;
use crate::list::Picture;
use crate::protocol::{self, Request};
use crate::runtime;
use crate::sandbox::User;
use crate::size::Size;
use crate::source::Source;
use crate::status::DiskReport;
use crate::toolstack::{self, NewDisk, Place, Wanted};
use crate::vdev::VirtualDevice;

/// Looks for mistakes in a configuration file.
///
/// # Errors
///
/// All of them.
pub fn check(options: &Check) -> Result<()> {
    let config = Config::read(&options.file)?;
    if let Some(user) = &config.user {
        User::find(user).with_context(|| format!("{}: user", options.file.display()))?;
    }
    let mut text = format!("{}: no mistake\n", options.file.display());
    for disk in &config.disk {
        // It may come later.
        if let Source::File(path) = &disk.target
            && !path.exists()
        {
            text += &format!("there is no {} now\n", path.display());
        }
    }
    say(&text).map(drop)
}

/// Gives a guest a disk.
///
/// # Errors
///
/// What is wrong, with what to do about it.
pub fn attach(options: &Attach) -> Result<()> {
    let control = Control::open()?;
    let store = Store::new(&control);
    let place = place(&store, &options.domain, options.disk)?;
    let disk =
        NewDisk { place, source: source(&options.source)?, options: options.options.options() };
    disk.options.check()?;
    disk.options.check_source(&disk.source)?;
    toolstack::attach(&store, &disk)?;
    let patience = Duration::from_secs(options.timeout);
    let wanted = if options.no_wait { Wanted::Open } else { Wanted::Connected };
    let warning = toolstack::wait_for((&store, &control), &disk.place, wanted, patience)?;
    if let Some(warning) = warning {
        eprintln!("pvblkd: warning: {warning}");
    }
    Ok(())
}

/// Takes a disk away.
///
/// # Errors
///
/// What is wrong, with what to do about it.
pub fn detach(options: &Detach) -> Result<()> {
    let control = Control::open()?;
    let store = Store::new(&control);
    let place = place(&store, &options.domain, options.disk)?;
    let patience = Duration::from_secs(options.timeout);
    toolstack::detach((&store, &control), &place, options.force, patience)
}

/// Gives a disk another size.
///
/// # Errors
///
/// What is wrong, with what to do about it.
pub fn resize(options: &Resize) -> Result<()> {
    let domain = number(&options.domain)?;
    let request =
        Request::Resize { domain, device: options.disk.0, bytes: options.size.map(Size::bytes) };
    let socket = runtime::socket(&options.place.folder());
    let bytes: u64 = protocol::ask(&socket, &request)?;
    say(&format!("{bytes} bytes\n")).map(drop)
}

/// The number of a domain. XenStore is asked only for a name.
fn number(domain: &str) -> Result<u16> {
    match domain.parse() {
        Ok(number) => Ok(number),
        Err(_) => {
            let control = Control::open()?;
            Ok(toolstack::find_domain(&Store::new(&control), domain)?.0)
        }
    }
}

/// Limits what a disk does, or shows its limits.
///
/// # Errors
///
/// If there is no daemon, or no such disk.
pub fn limit(options: &Limit) -> Result<()> {
    let domain = number(&options.domain)?;
    let Limit { iops, bps, burst, .. } = *options;
    let request = Request::Limit { domain, device: options.disk.0, iops, bps, burst };
    let limits: Limits = protocol::ask(&runtime::socket(&options.place.folder()), &request)?;
    let number = |value: u64| if value == 0 { "no limit".into() } else { value.to_string() };
    say(&format!(
        "iops: {}, bps: {}, burst: {} ms\n",
        number(limits.iops),
        number(limits.bps),
        limits.burst
    ))
    .map(drop)
}

/// Shows all disks.
///
/// # Errors
///
/// If there is no daemon.
pub fn list(options: &List) -> Result<()> {
    let socket = runtime::socket(&options.place.folder());
    let ask = || disks(&socket, options.latency);
    if options.json {
        return say(&(serde_json::to_string_pretty(&ask()?)? + "\n")).map(drop);
    }
    let interval = Duration::try_from_secs_f64(options.interval).context("--interval")?;
    let start = Instant::now();
    let before = ask()?;
    thread::sleep(interval);
    let now = ask()?;
    let picture = Picture { before: &before, now: &now, seconds: seconds_since(start) };
    say(&if options.latency { picture.latencies() } else { picture.table() }).map(drop)
}

/// Shows all disks, again and again.
///
/// # Errors
///
/// If there is no daemon any more.
pub fn top(options: &Top) -> Result<()> {
    let socket = runtime::socket(&options.place.folder());
    let interval = Duration::try_from_secs_f64(options.interval).context("--interval")?;
    let (mut before, mut start) = (disks(&socket, true)?, Instant::now());
    let mut shown = 0;
    while options.count.is_none_or(|count| shown < count) {
        thread::sleep(interval);
        let now = disks(&socket, true)?;
        let picture = Picture { before: &before, now: &now, seconds: seconds_since(start) };
        start = Instant::now();
        let text = picture.table() + "\n" + &picture.latencies();
        // A terminal is cleared; anything else has one after the other.
        let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
        if !say(&format!("{clear}{text}"))? {
            return Ok(());
        }
        before = now;
        shown += 1;
    }
    Ok(())
}

fn disks(socket: &Path, latency: bool) -> Result<Vec<DiskReport>> {
    protocol::ask(socket, &Request::List { latency })
}

fn seconds_since(start: Instant) -> f64 {
    start.elapsed().max(Duration::from_millis(1)).as_secs_f64()
}

fn place<T>(store: &Store<&T>, domain: &str, device: VirtualDevice) -> Result<Place>
where
    T: pvblk_xen::platform::StoreTransport + pvblk_xen::platform::Clock,
{
    Ok(Place {
        backend: toolstack::own_domain(store)?,
        frontend: toolstack::find_domain(store, domain)?,
        device,
    })
}

fn source(args: &SourceArgs) -> Result<Source> {
    if let Some(path) = &args.file {
        // The daemon is somewhere else.
        let folder = std::env::current_dir().context("where is this?")?;
        return Ok(Source::file(&folder, path)?);
    }
    if let Some(url) = &args.nbd {
        return Ok(Source::Nbd(url.parse()?));
    }
    // One of the three is there.
    Ok(Source::Memory(args.memory.clone().context("--file, --memory or --nbd is expected")?))
}

/// Writes to the standard output. `false` if nobody is there to read it.
fn say(text: &str) -> Result<bool> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        result => Ok(result.map(|()| true)?),
    }
}
