//! What a disk is served from, as it is written in a guest's configuration and in XenStore.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pvblk_stores::nbd::{Url, UrlError};

use crate::size::{BadSize, Size};

/// What a disk is served from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `file:/PATH` or `/PATH`: a file or a block device.
    File(PathBuf),
    /// `memory:SIZE` or `memory:NAME:SIZE`: memory, of zeroes at first.
    Memory(MemorySource),
    /// `nbd://HOST[:PORT][/EXPORT]` or `nbd+unix:///EXPORT?socket=PATH`.
    Nbd(Url),
}

/// Memory that a disk is served from: `SIZE` or `NAME:SIZE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySource {
    /// What it is called, if it is to stay when its disk is gone, and if disks are to share it.
    pub name: Option<String>,
    /// How large it is.
    pub size: Size,
}

impl FromStr for MemorySource {
    type Err = BadSource;

    fn from_str(text: &str) -> Result<Self, BadSource> {
        let (name, size) = match text.rsplit_once(':') {
            Some((name, size)) => (Some(name), size),
            None => (None, text),
        };
        // It becomes the name of a file.
        let is_plain = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            (1..=64).contains(&name.len()) && name.chars().all(plain)
        };
        if let Some(name) = name
            && !is_plain(name)
        {
            return Err(BadSource::Name(name.into()));
        }
        let size = size.parse().map_err(BadSource::Size)?;
        Ok(Self { name: name.map(str::to_owned), size })
    }
}

impl fmt::Display for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "memory:{name}:{}", self.size),
            None => write!(f, "memory:{}", self.size),
        }
    }
}

/// A text that names nothing that a disk can be served from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadSource {
    /// It is none of the forms there are.
    Form(String),
    /// It is a path that depends on where one is.
    Relative(String),
    /// The URL of a disk on a server makes no sense.
    Url(UrlError),
    /// Memory cannot be called that.
    Name(String),
    /// The size of a disk in memory makes no sense.
    Size(BadSize),
}

impl fmt::Display for BadSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form(text) => write!(
                f,
                "{text:?} names nothing that a disk can be served from: file:/PATH, memory:SIZE or \
                 nbd://HOST/EXPORT is expected"
            ),
            Self::Relative(path) => write!(f, "{path:?} is not an absolute path"),
            Self::Name(name) => write!(
                f,
                "memory cannot be called {name:?}: up to 64 letters, digits, dots, hyphens and \
                 underscores are expected"
            ),
            Self::Size(error) => error.fmt(f),
            Self::Url(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BadSource {}

impl FromStr for Source {
    type Err = BadSource;

    fn from_str(text: &str) -> Result<Self, BadSource> {
        let path = |path: &str| match path.starts_with('/') && !path.contains('\0') {
            true => Ok(Self::File(path.into())),
            false => Err(BadSource::Relative(path.into())),
        };
        if let Some(rest) = text.strip_prefix("file:") {
            path(rest)
        } else if let Some(memory) = text.strip_prefix("memory:") {
            memory.parse().map(Self::Memory)
        } else if text.starts_with("nbd") {
            text.parse().map(Self::Nbd).map_err(BadSource::Url)
        } else if text.starts_with('/') {
            path(text)
        } else {
            Err(BadSource::Form(text.into()))
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Memory(memory) => memory.fmt(f),
            Self::Nbd(url) => url.fmt(f),
        }
    }
}

impl Source {
    /// A file, by a path that may be relative to `folder`.
    ///
    /// # Errors
    ///
    /// [`BadSource`] for a path that XenStore cannot hold.
    pub fn file(folder: &Path, path: &Path) -> Result<Self, BadSource> {
        let whole = folder.join(path);
        let text = whole.to_str().ok_or_else(|| BadSource::Form(path.display().to_string()))?;
        format!("file:{text}").parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_and_written() {
        for (text, again) in [
            ("/dev/ram0", "file:/dev/ram0"),
            ("file:/srv/disk one,two.img", "file:/srv/disk one,two.img"),
            ("memory:65536K", "memory:64M"),
            ("memory:web-1.swap:65536K", "memory:web-1.swap:64M"),
            ("nbd://host:99/export", "nbd://host:99/export"),
            ("nbd+unix:///x?socket=/run/nbd", "nbd+unix:///x?socket=/run/nbd"),
        ] {
            let source: Source = text.parse().unwrap();
            assert_eq!(source.to_string(), again);
            assert_eq!(again.parse(), Ok(source));
        }
        let file = Source::file(Path::new("/srv"), Path::new("disk.img")).unwrap();
        assert_eq!(file.to_string(), "file:/srv/disk.img");
    }

    #[test]
    fn what_is_no_source_is_refused() {
        for (text, reason) in [
            ("", "is expected"),
            ("disk.img", "is expected"),
            ("file:disk.img", "absolute"),
            ("memory:lots", "powers of 1024"),
            ("memory:../x:64M", "cannot be called"),
            ("memory::64M", "cannot be called"),
            ("aio:/x", "is expected"),
            ("nbds://host/x", "TLS"),
        ] {
            let error = text.parse::<Source>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
