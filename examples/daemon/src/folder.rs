//! A folder that is opened once; what is in it is reached by its descriptor and one name.
//!
//! A daemon that starts as root and keeps files in a folder of an unprivileged user must not be led
//! elsewhere by that user: no link is followed, neither for the folder nor for a file in it, and
//! nobody else may write to the folder.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, mkdir, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::sandbox::User;

/// An open folder. Clones are the same descriptor.
#[derive(Clone, Debug)]
pub struct Folder {
    descriptor: Arc<OwnedFd>,
    path: PathBuf,
}

impl Folder {
    /// Opens a folder, whoever may write to it.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(path, OFlags::empty())
    }

    fn open_with(path: &Path, flags: OFlags) -> io::Result<Self> {
        let flags = flags | OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = openat(CWD, path, flags, Mode::empty())?;
        Ok(Self { descriptor: Arc::new(descriptor), path: path.into() })
    }

    /// Opens a folder that is this program's own, or makes it, for its owner alone. With a `user`
    /// that this program is going to be, it becomes the user's.
    ///
    /// # Errors
    ///
    /// If it belongs to somebody else, or others may write to it; what the system says.
    pub fn open_own(path: &Path, user: Option<&User>) -> Result<Self> {
        match mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).context("it cannot be made"),
        }
        let folder = match Self::open_with(path, OFlags::NOFOLLOW) {
            Err(error) if is_link(&error) => {
                bail!("it is a link, or no folder: name the folder itself")
            }
            folder => folder.context("it cannot be opened")?,
        };
        let stat = fstat(&folder.descriptor).context("it cannot be looked at")?;
        let own = geteuid().as_raw();
        if stat.st_uid != own && user.is_none_or(|user| user.uid() != stat.st_uid) {
            bail!(
                "it belongs to the user {}, and this is {own}: give it to the user who runs this \
                 (chown), or name another folder",
                stat.st_uid
            );
        }
        if Mode::from_raw_mode(stat.st_mode).intersects(Mode::WGRP | Mode::WOTH) {
            bail!("others than its owner may write to it: take that away (chmod go-w)");
        }
        if let Some(user) = user {
            user.own(folder.as_fd()).context("it cannot be given to the user")?;
        }
        Ok(folder)
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path to `name` in it that leads through the descriptor, wherever the folder is by now.
    pub fn path_of(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.descriptor.as_raw_fd()).into()
    }

    /// Opens a file for reading and writing, or makes it, for its owner alone.
    ///
    /// # Errors
    ///
    /// What the system says; `InvalidInput` if there is something of that name that is not a file of
    /// this program's own: a link, another user's, or one with further names.
    pub fn file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        if name.contains('/') {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        let file = openat(&self.descriptor, name, flags, Mode::RUSR | Mode::WUSR);
        let file = file.map_err(io::Error::from);
        let file =
            file.map_err(|error| if is_link(&error) { self.not_own(name) } else { error })?;
        let stat = fstat(&file)?;
        if !is_own(&stat, FileType::RegularFile) {
            return Err(self.not_own(name));
        }
        Ok(file.into())
    }

    fn not_own(&self, name: &str) -> io::Error {
        let text = format!(
            "{} is a link, or no file of this program's own: remove it",
            self.path.join(name).display()
        );
        io::Error::new(io::ErrorKind::InvalidInput, text)
    }

    /// The size of a file in bytes; `None` if there is none that could be opened.
    pub fn size_of(&self, name: &str) -> Option<u64> {
        let stat = rustix::fs::statat(&self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        is_own(&stat, FileType::RegularFile).then(|| u64::try_from(stat.st_size).ok())?
    }

    /// Removes a file, or a link itself.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.descriptor, name, AtFlags::empty())?)
    }

    /// What is in it, as far as that is text.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = Dir::read_from(&self.descriptor) else { return Vec::new() };
        let name = |entry: rustix::io::Result<rustix::fs::DirEntry>| {
            entry.ok()?.file_name().to_str().map(str::to_owned).ok()
        };
        entries.filter_map(name).filter(|name| name != "." && name != "..").collect()
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Whether it is of that kind, of this process's user, and has one name.
pub(crate) fn is_own(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
        && stat.st_uid == geteuid().as_raw()
        && stat.st_nlink == 1
}

/// What the system says of a link that is not to be followed.
fn is_link(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::LOOP | Errno::NOTDIR))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn error(path: &Path, user: Option<&User>) -> String {
        format!("{:#}", Folder::open_own(path, user).unwrap_err())
    }

    #[test]
    fn a_folder_of_others_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("run");
        Folder::open_own(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        for mode in [0o770, 0o702, 0o1777] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(error(&path, None).contains("chmod go-w"), "{mode:o}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Folder::open_own(&path, None).unwrap();
        let link = outer.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(error(&link, None).contains("a link"));
        fs::write(outer.path().join("file"), "").unwrap();
        assert!(error(&outer.path().join("file"), None).contains("no folder"));
        if !geteuid().is_root() {
            eprintln!("SKIPPED: folders of other users, which only root can make");
            return;
        }
        let user = User::with_ids(12345, 12345);
        let other = User::with_ids(23456, 23456);
        Folder::open_own(&path, Some(&user)).unwrap();
        assert!(error(&path, None).contains("belongs to the user 12345"));
        assert!(error(&path, Some(&other)).contains("belongs to the user 12345"));
        // When it is started again.
        Folder::open_own(&path, Some(&user)).unwrap();
    }

    #[test]
    fn links_in_it_are_not_followed() {
        let outer = tempfile::tempdir().unwrap();
        let target = outer.path().join("target");
        fs::write(&target, "untouched").unwrap();
        let path = outer.path().join("run");
        let folder = Folder::open_own(&path, None).unwrap();
        symlink(&target, path.join("link")).unwrap();
        symlink(outer.path().join("missing"), path.join("dangling")).unwrap();
        fs::hard_link(&target, path.join("hard")).unwrap();
        fs::create_dir(path.join("folder")).unwrap();
        for name in ["link", "dangling", "hard"] {
            let error = folder.file(name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
            assert!(error.to_string().contains("remove it"));
            assert_eq!(folder.size_of(name), None, "{name}");
        }
        assert!(folder.file("folder").is_err() && folder.file("../target").is_err());
        folder.file("own").unwrap().set_len(7).unwrap();
        assert_eq!(folder.size_of("own"), Some(7));
        let mut names = folder.names();
        names.sort();
        assert_eq!(names, ["dangling", "folder", "hard", "link", "own"]);
        folder.remove("link").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"untouched");
        assert!(!outer.path().join("missing").exists());
        // It is the folder that was opened, wherever it is by now.
        fs::rename(&path, outer.path().join("moved")).unwrap();
        symlink(outer.path(), &path).unwrap();
        folder.remove("own").unwrap();
        assert!(!outer.path().join("moved/own").exists());
    }
}
