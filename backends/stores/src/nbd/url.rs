//! Where a disk is, as a URL.
//!
//! The form is that of the NBD project's `doc/uri.md`, without TLS.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::string::{String, ToString};
use std::vec::Vec;

/// The port of NBD (registered with IANA).
const PORT: u16 = 10809;

/// Where a disk is: `nbd://host[:port]/export` or `nbd+unix:///export?socket=/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    pub(super) server: Server,
    pub(super) export: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// What is wrong with a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// It is of another kind.
    #[error("not an NBD URL: write nbd://host[:port]/export or nbd+unix:///export?socket=/path")]
    Scheme,
    /// It asks for TLS.
    #[error("TLS is not supported: use nbd:// over a network that can be trusted, or a tunnel")]
    Tls,
    /// It names no host, or a bad port.
    #[error("no host, or no port from 1 to 65535: write nbd://host[:port]/export")]
    Authority,
    /// It names no socket.
    #[error("no socket: write nbd+unix:///export?socket=/path")]
    Socket,
    /// A `%` without two hexadecimal digits, or bytes that are not UTF-8.
    #[error("a bad %-sequence")]
    Escape,
    /// The name of an export has at most 4096 bytes.
    #[error("the name of the export is longer than 4096 bytes")]
    ExportName,
}

impl Url {
    /// The name of the export.
    pub fn export(&self) -> &str {
        &self.export
    }
}

fn unescape(text: &str) -> Result<String, UrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => match (digit(rest.next()), digit(rest.next())) {
                (Some(high), Some(low)) => (high << 4 | low) as u8,
                _ => return Err(UrlError::Escape),
            },
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| UrlError::Escape)
}

/// Host and port; the host of an IPv6 address is in brackets.
fn authority(text: &str) -> Result<Server, UrlError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(text) => {
            let (host, rest) = text.split_once(']').ok_or(UrlError::Authority)?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")))
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, Some("")),
        },
    };
    let port = match port.ok_or(UrlError::Authority)? {
        "" => PORT,
        port => port.parse().ok().filter(|port| *port != 0).ok_or(UrlError::Authority)?,
    };
    let host = unescape(host)?;
    if host.is_empty() || host.contains('@') {
        return Err(UrlError::Authority);
    }
    Ok(Server::Tcp { host, port })
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
        let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        // One slash ends the host and is not a part of the name.
        let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = unescape(export)?;
        if export.len() > 4096 {
            return Err(UrlError::ExportName);
        }
        let server = match scheme {
            "nbd" => authority(host)?,
            "nbd+unix" => {
                let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
                let socket = unescape(socket.unwrap_or(""))?;
                if socket.is_empty() || !host.is_empty() {
                    return Err(UrlError::Socket);
                }
                Server::Unix(socket.into())
            }
            "nbds" | "nbds+unix" => return Err(UrlError::Tls),
            _ => return Err(UrlError::Scheme),
        };
        Ok(Self { server, export })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            Server::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{}", escape(&self.export))
            }
            Server::Tcp { host, port } => {
                write!(f, "nbd://{}:{port}/{}", escape(host), escape(&self.export))
            }
            Server::Unix(path) => {
                let path = path.display().to_string();
                write!(f, "nbd+unix:///{}?socket={}", escape(&self.export), escape(&path))
            }
        }
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                escaped.push(byte.into());
            }
            byte => escaped.push_str(&std::format!("%{byte:02x}")),
        }
    }
    escaped
}
