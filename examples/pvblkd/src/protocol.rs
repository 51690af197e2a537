//! How commands reach the running daemon: a Unix socket, one line of JSON for a request, one for its
//! answer.
//!
//! ```json
//! {"command":"list"}
//! {"command":"resize","domain":3,"device":51728,"bytes":1073741824}
//! {"command":"limit","domain":3,"device":51728,"iops":500,"bps":0}
//! ```
//!
//! The answer is `{"ok":...}` or `{"error":"..."}`. `attach` and `detach` need no daemon to talk to:
//! they write what a toolstack writes, and the daemon finds it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use pvblk_daemon::limit::Limits;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::deadline::Deadline;
use crate::mail::Mailbox;
use crate::sandbox::User;
use crate::size::Size;
use crate::socket;
use crate::status::Registry;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// All disks: an array of [`DiskReport`](crate::status::DiskReport).
    List {
        /// Whether histograms of latencies are wanted, which are long.
        #[serde(default)]
        latency: bool,
    },
    /// Limits what a disk does in a second, as far as it is said. Its [limits](Limits) then.
    Limit {
        /// The guest's domain.
        domain: u16,
        /// The number of the device.
        device: u32,
        /// The most requests; 0 for no limit.
        #[serde(default)]
        iops: Option<u64>,
        /// The most bytes; 0 for no limit.
        #[serde(default)]
        bps: Option<u64>,
        /// How long these may be saved up, in milliseconds.
        #[serde(default)]
        burst: Option<u64>,
    },
    /// Gives a disk another size, or finds out which size it has now. Its size in bytes.
    Resize {
        /// The guest's domain.
        domain: u16,
        /// The number of the device.
        device: u32,
        /// The size in bytes; that of the file if it is missing.
        #[serde(default)]
        bytes: Option<u64>,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer<T> {
    /// What was asked for.
    Ok(T),
    /// Why there is none.
    Error(String),
}

/// What the daemon's own thread is asked to do.
#[derive(Debug)]
pub struct Resize {
    /// The guest's domain.
    pub domain: u16,
    /// The number of the device.
    pub device: u32,
    /// The size that it is to have.
    pub size: Option<Size>,
    /// Where the answer goes: bytes.
    pub answer: mpsc::Sender<Result<u64>>,
}

/// The longest request, in bytes.
const LINE_MAX: u64 = 4096;

/// How long a client may take to ask, the daemon to find the answer, and the client to take it: each
/// as a whole.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits for clients at `path`, which only the owner may connect to: `user`, if there is one.
///
/// # Errors
///
/// If the socket cannot be made; above all, if another daemon has it.
pub fn listen(path: &Path, user: Option<&User>) -> Result<UnixListener> {
    socket::listen(path, 0o600, user)
}

/// Answers clients, one after the other. It returns only if the socket breaks.
pub fn serve<T: From<Resize>>(listener: &UnixListener, registry: &Registry, daemon: &Mailbox<T>) {
    for client in listener.incoming() {
        match client {
            Ok(client) => {
                if let Err(error) = serve_client(&client, registry, daemon) {
                    log::debug!("control socket: {error:#}");
                }
            }
            Err(error) => {
                log::warn!("control socket: {error}");
                // Out of file descriptors, most likely: not again and again.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn serve_client<T: From<Resize>>(
    client: &UnixStream,
    registry: &Registry,
    daemon: &Mailbox<T>,
) -> Result<()> {
    let asking = Deadline::new(client, PATIENCE);
    let mut line = String::new();
    BufReader::new(asking.take(LINE_MAX)).read_line(&mut line)?;
    let answer = match answer(&line, registry, daemon) {
        Ok(value) => Answer::Ok(value),
        Err(error) => Answer::Error(format!("{error:#}")),
    };
    let mut text = serde_json::to_string(&answer)?;
    text.push('\n');
    Deadline::new(client, PATIENCE).write_all(text.as_bytes())?;
    Ok(())
}

fn answer<T: From<Resize>>(
    line: &str,
    registry: &Registry,
    daemon: &Mailbox<T>,
) -> Result<serde_json::Value> {
    match serde_json::from_str(line).context("no request that is known")? {
        Request::List { latency } => Ok(serde_json::to_value(registry.report(latency))?),
        Request::Limit { domain, device, iops, bps, burst } => {
            let disk = registry.find(domain, device);
            let limiter = disk.context("pvblkd serves no such disk: see `pvblkd list`")?.limiter();
            let had = limiter.limits();
            let limits = Limits {
                iops: iops.unwrap_or(had.iops),
                bps: bps.unwrap_or(had.bps),
                burst: burst.unwrap_or(had.burst),
            };
            limiter.set(limits);
            Ok(serde_json::to_value(limits)?)
        }
        Request::Resize { domain, device, bytes } => {
            let size = bytes.map(Size::from_bytes).transpose()?;
            let (sender, receiver) = mpsc::channel();
            daemon.send(T::from(Resize { domain, device, size, answer: sender }));
            let bytes =
                receiver.recv_timeout(PATIENCE).map_err(|_| anyhow!("no answer in time"))??;
            Ok(bytes.into())
        }
    }
}

/// Asks the daemon whose socket is at `path`.
///
/// # Errors
///
/// If there is no daemon, and what the daemon says.
pub fn ask<T: DeserializeOwned>(path: &Path, request: &Request) -> Result<T> {
    let mut stream = UnixStream::connect(path).with_context(|| {
        format!("no daemon at {}: is `pvblkd serve` running, and is this root?", path.display())
    })?;
    stream.set_read_timeout(Some(2 * PATIENCE))?;
    let mut text = serde_json::to_string(request)?;
    text.push('\n');
    stream.write_all(text.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("no answer from the daemon")?;
    match serde_json::from_str(&line).context("an answer of another version of pvblkd")? {
        Answer::Ok(value) => Ok(value),
        Answer::Error(error) => Err(anyhow!(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::thread;

    use super::*;
    use crate::runtime::DiskName;
    use crate::status::DiskReport;

    #[test]
    fn questions_are_answered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        fs::write(&path, "what was there before").unwrap();
        assert!(listen(&path, None).is_err(), "it is somebody's file");
        fs::remove_file(&path).unwrap();
        drop(listen(&path, None).unwrap());
        let listener = listen(&path, None).unwrap();
        let registry = Registry::default();
        let name = DiskName { class: "pvblk", domain: 7, device: 51728 };
        registry.add(&name).update(|condition| condition.guest = "web".into());
        registry.add(&DiskName { domain: 8, ..name.clone() });
        let mailbox = Mailbox::<Resize>::new().unwrap();
        let (daemon, registry_of_daemon) = (mailbox.clone(), registry.clone());
        thread::spawn(move || serve(&listener, &registry, &daemon));

        let disks: Vec<DiskReport> = ask(&path, &Request::List { latency: false }).unwrap();
        assert_eq!(disks.len(), 2);
        assert_eq!((&*disks[0].guest, &*disks[0].disk, disks[0].domain), ("web", "xvdb", 7));

        let limit = |domain, iops, bps| {
            let request = Request::Limit { domain, device: 51728, iops, bps, burst: None };
            ask::<Limits>(&path, &request)
        };
        assert_eq!(limit(7, Some(100), None).unwrap().iops, 100);
        assert_eq!(limit(7, None, Some(9)).unwrap(), Limits { iops: 100, bps: 9, burst: 0 });
        assert_eq!(
            registry_of_daemon.find(8, 51728).unwrap().limiter().limits(),
            Limits::default()
        );
        assert!(limit(9, None, None).unwrap_err().to_string().contains("no such disk"));

        let server = thread::spawn(move || {
            for result in [Ok(1 << 20), Err(anyhow!("it is too small"))] {
                while !mailbox.has_some() {
                    thread::sleep(Duration::from_millis(1));
                }
                let resize = mailbox.take().pop_front().unwrap();
                assert_eq!((resize.domain, resize.device), (7, 51728));
                resize.answer.send(result).unwrap();
            }
        });
        let resize = |bytes| Request::Resize { domain: 7, device: 51728, bytes };
        assert_eq!(ask::<u64>(&path, &resize(None)).unwrap(), 1 << 20);
        let error = ask::<u64>(&path, &resize(Some(512))).unwrap_err();
        assert_eq!(error.to_string(), "it is too small");
        server.join().unwrap();
        let error = ask::<u64>(&path, &resize(Some(100))).unwrap_err();
        assert!(error.to_string().contains("not the size of a disk"), "{error}");

        // Nonsense is answered, and the next client is served.
        for nonsense in ["\n", "{\"command\":\"explode\"}\n", "{\"command\":\"list\",\"x\":1}\n"] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(nonsense.as_bytes()).unwrap();
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).unwrap();
            assert!(line.starts_with("{\"error\":\"no request that is known"), "{line}");
        }
        drop(UnixStream::connect(&path).unwrap());
        assert!(listen_is_taken(&path));
        assert_eq!(
            ask::<Vec<DiskReport>>(&path, &Request::List { latency: false }).unwrap().len(),
            2
        );
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_client_that_drips_does_not_keep_others_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = listen(&path, None).unwrap();
        let mailbox = Mailbox::<Resize>::new().unwrap();
        thread::spawn(move || serve(&listener, &Registry::default(), &mailbox));
        let mut dripping = UnixStream::connect(&path).unwrap();
        dripping.write_all(b"{").unwrap();
        thread::spawn(move || {
            while dripping.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(450));
            }
        });
        let mut other = UnixStream::connect(&path).unwrap();
        other.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        other.write_all(b"{\"command\":\"list\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(other).read_line(&mut line).unwrap();
        assert_eq!(line, "{\"ok\":[]}\n");
    }

    fn listen_is_taken(path: &Path) -> bool {
        listen(path, None).is_err_and(|error| error.to_string().contains("another daemon"))
    }

    #[test]
    fn without_a_daemon_the_error_says_so() {
        let error =
            ask::<u64>(Path::new("/nonexistent/control.sock"), &Request::List { latency: false })
                .unwrap_err();
        assert!(error.to_string().contains("is `pvblkd serve` running"));
    }
}
