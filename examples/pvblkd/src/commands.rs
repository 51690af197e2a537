//! The commands that an administrator gives while the daemon runs.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pvblk_linux::Control;
use pvblk_xen::platform::DomainId;
use pvblk_xen::store::Store;

use crate::cli::{Attach, Check, Detach, List, Resize, SourceArgs};
use crate::config::Config;
use crate::list;
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
    say(&text)
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
    let domain = match options.domain.parse() {
        Ok(number) => DomainId(number),
        Err(_) => {
            let control = Control::open()?;
            toolstack::find_domain(&Store::new(&control), &options.domain)?
        }
    };
    let request = Request::Resize {
        domain: domain.0,
        device: options.disk.0,
        bytes: options.size.map(Size::bytes),
    };
    let socket = runtime::socket(&options.place.folder());
    let bytes: u64 = protocol::ask(&socket, &request)?;
    say(&format!("{bytes} bytes\n"))
}

/// Shows all disks.
///
/// # Errors
///
/// If there is no daemon.
pub fn list(options: &List) -> Result<()> {
    let socket = runtime::socket(&options.place.folder());
    let ask = || protocol::ask::<Vec<DiskReport>>(&socket, &Request::List {});
    if options.json {
        return say(&(serde_json::to_string_pretty(&ask()?)? + "\n"));
    }
    let interval = Duration::try_from_secs_f64(options.interval).context("--interval")?;
    let start = Instant::now();
    let before = ask()?;
    thread::sleep(interval);
    let now = ask()?;
    let seconds = start.elapsed().max(Duration::from_millis(1)).as_secs_f64();
    say(&list::table(&before, &now, seconds))
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

/// Writes to the standard output, of which nobody may be there to read it.
fn say(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
