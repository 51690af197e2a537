//! The counters as Prometheus reads them (its text format, version 0.0.4), over HTTP.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::figures::Figures;
use crate::status::{DiskReport, QueueReport, Registry};

/// Where the counters can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port of this machine's own.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let address: SocketAddr = text.parse().ok().with_context(|| {
            format!("{text:?} is no address: 127.0.0.1:9470 or unix:/PATH is expected")
        })?;
        if !address.ip().is_loopback() {
            bail!(
                "{text} can be reached by others, and nobody is asked who they are: choose a loopback \
                 address, and a proxy before it if need be"
            );
        }
        Ok(Self::Tcp(address))
    }
}

/// A socket that waits for Prometheus.
#[derive(Debug)]
pub enum Listener {
    /// See [`Address::Tcp`].
    Tcp(TcpListener),
    /// See [`Address::Unix`].
    Unix(UnixListener),
}

impl Listener {
    /// Waits at an address.
    ///
    /// # Errors
    ///
    /// If it cannot be had.
    pub fn open(address: &Address) -> Result<Self> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address);
                listener.map(Self::Tcp).with_context(|| format!("no metrics at {address}"))
            }
            Address::Unix(path) => {
                // Anybody may read counters who may look into the folder.
                let mode = Permissions::from_mode(0o666);
                let listener = crate::protocol::bind(path)
                    .and_then(|listener| std::fs::set_permissions(path, mode).map(|()| listener));
                listener
                    .map(Self::Unix)
                    .with_context(|| format!("no metrics at {}", path.display()))
            }
        }
    }

    /// Answers, one client after the other. It returns only if the socket breaks.
    pub fn serve(&self, registry: &Registry) {
        loop {
            let result = match self {
                Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
                Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            };
            match result {
                Ok(stream) => {
                    if let Err(error) = respond(stream, registry) {
                        log::debug!("metrics: {error}");
                    }
                }
                Err(error) => {
                    log::warn!("metrics: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// The longest head of a request, in bytes.
const HEAD_MAX: u64 = 8192;

/// How long a client may take to ask, and to take what it asked for.
const PATIENCE: Duration = Duration::from_secs(2);

fn respond(stream: Stream, registry: &Registry) -> io::Result<()> {
    match stream {
        Stream::Tcp(stream) => {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            exchange(&stream, &stream, registry)
        }
        Stream::Unix(stream) => {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            exchange(&stream, &stream, registry)
        }
    }
}

fn exchange(from: impl Read, mut to: impl Write, registry: &Registry) -> io::Result<()> {
    let mut head = BufReader::new(from.take(HEAD_MAX));
    let mut first = String::new();
    head.read_line(&mut first)?;
    // To the empty line: a connection that is closed with something unread is reset.
    let mut line = String::new();
    while head.read_line(&mut line)? > 0 && !line.trim_end().is_empty() {
        line.clear();
    }
    let mut words = first.split_whitespace();
    let (status, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/metrics" | "/")) => ("200 OK", text(&registry.report())),
        (Some("GET"), _) => ("404 Not Found", "only /metrics is here\n".into()),
        _ => ("405 Method Not Allowed", "only GET is answered\n".into()),
    };
    write!(
        to,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

/// A value of a queue: its name, what it is, and where it comes from.
type QueueMetric = (&'static str, &'static str, &'static str, fn(&QueueReport) -> u64);

/// An operation of a queue: its name, and how often it was done.
type Operation = (&'static str, fn(&Figures) -> u64);

const OPERATIONS: [Operation; 4] = [
    ("read", |figures| figures.reads),
    ("write", |figures| figures.writes),
    ("flush", |figures| figures.flushes),
    ("discard", |figures| figures.discards),
];

const QUEUE_METRICS: [QueueMetric; 14] = [
    ("read_bytes_total", "counter", "Bytes read.", |queue| queue.figures.bytes_read),
    ("written_bytes_total", "counter", "Bytes written.", |queue| queue.figures.bytes_written),
    ("errors_total", "counter", "Requests that failed or were refused.", |queue| {
        queue.figures.errors
    }),
    ("indirect_requests_total", "counter", "Requests with tables of segments.", |queue| {
        queue.figures.indirect
    }),
    ("answer_batches_total", "counter", "Batches of answers.", |queue| queue.figures.batches),
    ("notifications_total", "counter", "Notifications sent to the guest.", |queue| {
        queue.figures.notifications
    }),
    ("sleeps_total", "counter", "Times that the worker went to sleep.", |queue| {
        queue.figures.sleeps
    }),
    ("mapped_pages_total", "counter", "Pages mapped for one request.", |queue| {
        queue.figures.mapped
    }),
    ("copied_segments_total", "counter", "Segments copied by Xen.", |queue| queue.figures.copied),
    ("kept_mappings_total", "counter", "Pages mapped to be kept.", |queue| {
        queue.figures.kept_mapped
    }),
    ("refused_segments_total", "counter", "Segments that the guest did not grant.", |queue| {
        queue.figures.refused
    }),
    ("grant_batches_total", "counter", "Batches of grant operations.", |queue| {
        queue.figures.grant_batches
    }),
    ("kept_pages", "gauge", "Pages of the guest that are kept mapped.", |queue| queue.kept),
    ("requests_in_progress", "gauge", "Requests in progress.", |queue| queue.in_progress),
];

/// All counters of all disks.
pub fn text(disks: &[DiskReport]) -> String {
    let mut text = String::new();
    head(&mut text, "disk_connected", "gauge", "Whether the guest is connected.");
    for disk in disks {
        line(&mut text, "disk_connected", disk, "", u64::from(disk.connection.is_some()));
    }
    head(&mut text, "disk_sectors", "gauge", "Size of the disk in sectors of 512 bytes.");
    for disk in disks {
        line(&mut text, "disk_sectors", disk, "", disk.sectors);
    }
    head(&mut text, "medium_errors_total", "counter", "Operations that the medium failed.");
    for disk in disks {
        line(&mut text, "medium_errors_total", disk, "", disk.medium_errors);
    }
    head(&mut text, "requests_total", "counter", "Requests done.");
    for (disk, number, queue) in queues(disks) {
        for (operation, value) in OPERATIONS {
            let more = format!(",queue=\"{number}\",operation=\"{operation}\"");
            line(&mut text, "requests_total", disk, &more, value(&queue.figures));
        }
    }
    for (name, kind, what, value) in QUEUE_METRICS {
        head(&mut text, name, kind, what);
        for (disk, number, queue) in queues(disks) {
            line(&mut text, name, disk, &format!(",queue=\"{number}\""), value(queue));
        }
    }
    text
}

fn queues(disks: &[DiskReport]) -> impl Iterator<Item = (&DiskReport, usize, &QueueReport)> {
    let of_disk = |disk| move |(number, queue)| (disk, number, queue);
    disks.iter().flat_map(move |disk| disk.queues.iter().enumerate().map(of_disk(disk)))
}

fn head(text: &mut String, name: &str, kind: &str, what: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "# HELP pvblkd_{name} {what}\n# TYPE pvblkd_{name} {kind}");
}

fn line(text: &mut String, name: &str, disk: &DiskReport, more: &str, value: u64) {
    let guest = escape(&disk.guest);
    let (domain, device) = (disk.domain, &disk.disk);
    let _ = writeln!(
        text,
        "pvblkd_{name}{{domain=\"{domain}\",guest=\"{guest}\",disk=\"{device}\"{more}}} {value}"
    );
}

/// A guest may be called anything.
fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::DiskName;

    fn registry() -> Registry {
        let registry = Registry::default();
        let status = registry.add(&DiskName { class: "vbd", domain: 3, device: 51712 });
        status.update(|condition| {
            condition.guest = "a \"b\"\\\n".into();
            condition.sectors = 2048;
        });
        let figures = Figures { reads: 5, bytes_read: 20480, ..Figures::default() };
        status.queue(1).publish(&figures, 7, 2);
        registry
    }

    #[test]
    fn every_line_is_a_comment_or_a_value() {
        let text = text(&registry().report());
        for line in text.lines() {
            if line.starts_with("# HELP pvblkd_") || line.starts_with("# TYPE pvblkd_") {
                continue;
            }
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("pvblkd_") && name.ends_with('}'), "{line}");
            value.parse::<u64>().unwrap();
        }
        let labels = "domain=\"3\",guest=\"a \\\"b\\\"\\\\\\n\",disk=\"xvda\"";
        for line in [
            format!("pvblkd_disk_sectors{{{labels}}} 2048"),
            format!("pvblkd_requests_total{{{labels},queue=\"1\",operation=\"read\"}} 5"),
            format!("pvblkd_read_bytes_total{{{labels},queue=\"1\"}} 20480"),
            format!("pvblkd_read_bytes_total{{{labels},queue=\"0\"}} 0"),
            format!("pvblkd_kept_pages{{{labels},queue=\"1\"}} 7"),
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\n{text}");
        }
    }

    #[test]
    fn http_is_spoken() {
        let listener = Listener::open(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(tcp) = &listener else { panic!() };
        let address = tcp.local_addr().unwrap();
        std::thread::spawn(move || listener.serve(&registry()));
        let get = |request: &str| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        let answer = get("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
        assert!(body.contains("pvblkd_disk_connected"));
        assert!(get("GET /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(get("POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn addresses_are_of_this_machine_alone() {
        assert_eq!("unix:/run/x".parse::<Address>().unwrap(), Address::Unix("/run/x".into()));
        assert!("[::1]:9470".parse::<Address>().is_ok());
        for (text, words) in [("0.0.0.0:9470", "loopback"), ("9470", "is expected")] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
