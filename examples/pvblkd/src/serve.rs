//! `pvblkd serve`: everything around the daemon.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use pvblk_xen::store::Store;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cli::{RUNTIME, Serve};
use crate::config::{Config, ServeVbd};
use crate::daemon::{Common, Daemon, Message};
use crate::host::Host;
use crate::http::{Address, Listener};
use crate::mail::Mailbox;
use crate::metrics;
use crate::notify;
use crate::protocol;
use crate::runtime::Runtime;
use crate::sandbox::{self, User};
use crate::toolstack;

/// What xen-blkback's driver is called where it is loaded.
const BLKBACK: &str = "/sys/bus/xen-backend/drivers/vbd";

/// Serves disks until a signal, on the machine that `host` is.
///
/// # Errors
///
/// If the daemon cannot begin. Once it has, nothing is an error that ends it.
pub fn serve<H: Host>(options: Serve, host: H) -> Result<()> {
    let config = configuration(&options)?;
    crate::logging::start(config.log.unwrap_or_default(), config.level());
    let classes = classes(config.vbd.unwrap_or_default(), Path::new(BLKBACK).exists())?;

    // What takes privileges. A worker's devices are opened to see that they can be, now and not
    // when the first disk comes.
    drop(host.worker()?);
    let control = host.control()?;
    raise_file_limit();
    let folder = config.runtime.clone().unwrap_or_else(|| RUNTIME.into());
    let user = config.user.as_deref().map(User::find).transpose()?;
    if options.no_sandbox && user.is_some() {
        bail!("--user makes no sense with --no-sandbox");
    }
    let runtime = Runtime::open_for(&folder, user.as_ref())?;
    let commands = runtime.listen(user.as_ref())?;
    let metrics = config.metrics.as_deref().map(str::parse::<Address>).transpose()?;
    let metrics = metrics.as_ref().map(Listener::open).transpose()?;
    let processors = if config.pin.unwrap_or(false) { processors() } else { Vec::new() };

    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signals")?;

    // Before there are other threads: they have what this one has.
    if !options.no_sandbox {
        sandbox::drop_privileges(user.as_ref())?;
        sandbox::filter_system_calls()?;
        // Again, as what it is now.
        drop(host.worker().context("without privileges (its owner or --user must be allowed)")?);
    }

    let mailbox = Mailbox::new()?;
    let store = Store::new(&control);
    let common = Common::new(host, config, runtime.clone(), mailbox.clone(), processors);
    let registry = common.registry.clone();
    let mut daemon = Daemon::new(Arc::new(common), &store, &control, &classes)?;

    heed_signals(signals, mailbox.clone(), options)?;
    let of_commands = registry.clone();
    start("commands", move || protocol::serve(&commands, &of_commands, &mailbox))?;
    if let Some(listener) = metrics {
        start("metrics", move || listener.serve(|| metrics::text(&registry.report(true))))?;
    }
    notify::ready();
    daemon.run();
    notify::stopping();
    runtime.remove_socket();
    Ok(())
}

/// The configuration file, and over it what the command line says.
fn configuration(options: &Serve) -> Result<Config> {
    let mut config = match &options.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    config.metrics = options.metrics.clone().or(config.metrics);
    config.pin = options.pin.then_some(true).or(config.pin);
    config.log = options.log.or(config.log);
    config.log_level = options.log_level.or(config.log_level);
    config.user = options.user.clone().or(config.user);
    config.runtime = options.place.runtime.clone().or(config.runtime);
    config.vbd = options.vbd.or(config.vbd);
    config.defaults = options.disk.options().or(&config.defaults);
    config.defaults.check()?;
    Ok(config)
}

/// The folders below `backend` to serve.
fn classes(vbd: ServeVbd, blkback: bool) -> Result<Vec<&'static str>> {
    match (vbd, blkback) {
        (ServeVbd::Yes, true) => bail!(
            "xen-blkback is loaded, and serves backend/vbd: unload it (modprobe -r xen-blkback) and \
             keep it from being loaded (a line \"blacklist xen-blkback\" in /etc/modprobe.d), or \
             leave --vbd=yes out"
        ),
        (ServeVbd::Yes | ServeVbd::Auto, false) => Ok(vec!["vbd", toolstack::CLASS]),
        (ServeVbd::Auto, true) => {
            log::info!("xen-blkback is loaded: serving disks of `pvblkd attach` only");
            Ok(vec![toolstack::CLASS])
        }
        (ServeVbd::No, _) => Ok(vec![toolstack::CLASS]),
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let builder = thread::Builder::new().name(name.into());
    builder.spawn(work).with_context(|| format!("no thread for {name}"))?;
    Ok(())
}

/// SIGHUP has the configuration read again. The first of the other signals asks the daemon to end, the
/// second one ends it.
fn heed_signals(mut signals: Signals, mailbox: Mailbox<Message>, options: Serve) -> Result<()> {
    start("signals", move || {
        let mut is_ending = false;
        for signal in &mut signals {
            if signal == SIGHUP {
                match configuration(&options) {
                    Ok(config) => mailbox.send(Message::Reload(config.into())),
                    Err(error) => log::error!("the configuration stays as it was: {error:#}"),
                }
            } else if is_ending {
                log::warn!("ending at once, with requests in progress");
                std::process::exit(1);
            } else {
                is_ending = true;
                mailbox.send(Message::Stop);
            }
        }
    })
}

/// The processors that this process may run on.
fn processors() -> Vec<usize> {
    let set = rustix::thread::sched_getaffinity(None);
    let set = set.unwrap_or_else(|_| rustix::thread::CpuSet::new());
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|processor| set.is_set(*processor)).collect()
}

/// Every queue takes about five file descriptors.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    // What cannot be had is told when it is missing.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn the_command_line_counts_more_than_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pvblkd.toml");
        std::fs::write(
            &file,
            "pin = true\nlog = \"json\"\n[defaults]\nqueues = 2\nsector = 4096\n",
        )
        .unwrap();
        let line = ["pvblkd", "serve", "--log", "text", "--queues", "8", "--vbd", "no", "--config"];
        let words = line.map(std::ffi::OsString::from).into_iter().chain([file.into()]);
        let Command::Serve(options) = Cli::parse_from(words).command else { panic!() };
        let config = configuration(&options).unwrap();
        assert_eq!((config.pin, config.log), (Some(true), Some(crate::config::LogFormat::Text)));
        assert_eq!((config.defaults.queues, config.defaults.sector), (Some(8), Some(4096)));
        assert_eq!(config.vbd, Some(ServeVbd::No));
    }

    #[test]
    fn blkback_keeps_its_folder() {
        assert_eq!(classes(ServeVbd::Auto, false).unwrap(), ["vbd", "pvblk"]);
        assert_eq!(classes(ServeVbd::Auto, true).unwrap(), ["pvblk"]);
        assert_eq!(classes(ServeVbd::No, false).unwrap(), ["pvblk"]);
        let error = classes(ServeVbd::Yes, true).unwrap_err().to_string();
        assert!(error.contains("modprobe -r xen-blkback"));
    }

    #[test]
    fn there_are_processors() {
        assert!(!processors().is_empty());
    }
}
