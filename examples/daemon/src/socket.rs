//! Sockets in the file system.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

use crate::folder;
use crate::sandbox::User;

/// Waits for clients at `path`, which those may connect to whom `mode` lets write. It belongs to
/// `user`, if there is one.
///
/// # Errors
///
/// If the socket cannot be made; above all, if another daemon has it.
pub fn listen(path: &Path, mode: u32, user: Option<&User>) -> Result<UnixListener> {
    let place = || format!("cannot make the socket {}", path.display());
    if UnixStream::connect(path).is_ok() {
        bail!("another daemon serves {}", path.display());
    }
    bind(path, mode, user).with_context(place)
}

/// Waits at `path`, in the place of a socket that a program has left behind that was killed.
///
/// # Errors
///
/// What the system says.
pub fn bind(path: &Path, mode: u32, user: Option<&User>) -> Result<UnixListener> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    let socket = open(path)?;
    // Through the descriptor, which has no other way to its mode: whoever may write to the folder can
    // put a link in the place of the name.
    let descriptor = format!("/proc/self/fd/{}", socket.as_raw_fd());
    fs::set_permissions(descriptor, Permissions::from_mode(mode))?;
    if let Some(user) = user {
        user.own(socket.as_fd())?;
    }
    Ok(listener)
}

/// The socket that was made at `path`, and nothing that has taken its place.
fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = openat(CWD, path, flags, Mode::empty()).map_err(io::Error::from)?;
    if !folder::is_own(&fstat(&socket).map_err(io::Error::from)?, FileType::Socket) {
        bail!("something else was put in its place: who may write to that folder?");
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn mode_and_owner_are_those_of_the_socket_and_of_no_link() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
        for wanted in [0o600, 0o666] {
            drop(bind(&path, wanted, None).unwrap());
            assert_eq!(mode(&path), wanted);
        }
        let target = folder.path().join("target");
        fs::write(&target, "").unwrap();
        fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        let link = folder.path().join("link");
        symlink(&target, &link).unwrap();
        // A link is not replaced, and what was put there since the socket was made is not touched.
        assert!(bind(&link, 0o666, None).is_err());
        for other in [&link, &target] {
            let error = open(other).unwrap_err().to_string();
            assert!(error.contains("in its place"), "{error}");
        }
        assert_eq!(mode(&target), 0o640);
    }
}
