//! Sockets in the file system.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Waits for clients at `path`, which those may connect to whom `mode` lets write.
///
/// # Errors
///
/// If the socket cannot be made; above all, if another daemon has it.
pub fn listen(path: &Path, mode: u32) -> Result<UnixListener> {
    let place = || format!("cannot make the socket {}", path.display());
    if UnixStream::connect(path).is_ok() {
        bail!("another daemon serves {}", path.display());
    }
    let listener = bind(path).with_context(place)?;
    fs::set_permissions(path, Permissions::from_mode(mode)).with_context(place)?;
    Ok(listener)
}

/// Waits at `path`, in the place of a socket that a program has left behind that was killed.
///
/// # Errors
///
/// What the system says.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}
