//! Counters over HTTP, for Prometheus.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::deadline::Deadline;

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
                crate::socket::bind(path, 0o666, None)
                    .map(Self::Unix)
                    .with_context(|| format!("no metrics at {}", path.display()))
            }
        }
    }

    /// Answers with what `text` has at that moment, one client after the other.
    pub fn serve(&self, text: impl Fn() -> String) {
        loop {
            let result = match self {
                Self::Tcp(listener) => listener.accept().map(|(stream, _)| Stream::Tcp(stream)),
                Self::Unix(listener) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            };
            match result {
                Ok(stream) => {
                    if let Err(error) = respond(stream, &text) {
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

/// How long a client may take to ask and to take what it asked for, in all: others wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

fn respond(stream: Stream, text: &impl Fn() -> String) -> io::Result<()> {
    match stream {
        Stream::Tcp(stream) => exchange(Deadline::new(&stream, PATIENCE), text),
        Stream::Unix(stream) => exchange(Deadline::new(&stream, PATIENCE), text),
    }
}

fn exchange(stream: impl Read + Write + Copy, text: &impl Fn() -> String) -> io::Result<()> {
    let (from, mut to) = (stream, stream);
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
        (Some("GET"), Some("/metrics" | "/")) => ("200 OK", text()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_is_spoken() {
        let listener = Listener::open(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(tcp) = &listener else { panic!() };
        let address = tcp.local_addr().unwrap();
        std::thread::spawn(move || listener.serve(|| "daemon_disks 1\n".into()));
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
        assert!(body.contains("daemon_disks 1"));
        assert!(get("GET /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(get("POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    }

    #[test]
    fn slow_clients_do_not_keep_others_waiting() {
        let listener = Listener::open(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(tcp) = &listener else { panic!() };
        let address = tcp.local_addr().unwrap();
        // More than any socket holds: one that does not read is noticed.
        std::thread::spawn(move || listener.serve(|| "x".repeat(64 << 20)));
        // One that says nothing, one that does not listen, and one that would take an hour to ask.
        let silent = TcpStream::connect(address).unwrap();
        let mut deaf = TcpStream::connect(address).unwrap();
        deaf.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut dripping = TcpStream::connect(address).unwrap();
        std::thread::spawn(move || {
            while dripping.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(450));
            }
        });
        let mut other = TcpStream::connect(address).unwrap();
        other.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        other.write_all(b"GET /x HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        other.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        drop((silent, deaf));
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
