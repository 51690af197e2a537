//! The disk, past the guest's page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use pvblk_history::Range;
use rustix::fs::{SeekFrom, fdatasync, ioctl_blksszget, seek};

/// The largest request, in bytes.
pub const LARGEST: usize = 1 << 20;

/// Linux's requests to a block device that no wrapper has: `_IO(0x12, 119)` and `_IO(0x12, 127)` of
/// `linux/fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// An opened block device.
pub struct Disk {
    file: File,
    bytes: u64,
    sector_bytes: u32,
}

impl Disk {
    /// Opens it.
    pub fn open(path: &str) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let file = options.open(path)?;
        let sector_bytes = ioctl_blksszget(&file)?;
        let bytes = seek(&file, SeekFrom::End(0))?;
        Ok(Self { file, bytes, sector_bytes })
    }

    /// Its size, in logical sectors.
    pub fn sectors(&self) -> u64 {
        self.bytes / u64::from(self.sector_bytes)
    }

    /// Its logical sector, in bytes.
    pub fn sector_bytes(&self) -> usize {
        self.sector_bytes as usize
    }

    /// Memory for one request at a time.
    pub fn buffer(&self) -> Buffer {
        Buffer(vec![0; LARGEST + ALIGNMENT])
    }

    fn place(&self, range: Range) -> [u64; 2] {
        let unit = u64::from(self.sector_bytes);
        [range.first * unit, u64::from(range.count) * unit]
    }

    pub fn read(&self, range: Range, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.place(range)[0])
    }

    pub fn write(&self, range: Range, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.place(range)[0])
    }

    pub fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    pub fn discard(&self, range: Range) -> io::Result<()> {
        self.change(BLKDISCARD, range)
    }

    pub fn write_zeroes(&self, range: Range) -> io::Result<()> {
        self.change(BLKZEROOUT, range)
    }

    fn change(&self, request: libc::c_ulong, range: Range) -> io::Result<()> {
        let place = self.place(range);
        // SAFETY: both requests read two numbers, which live as long as the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, place.as_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// What direct access wants memory to be aligned to.
const ALIGNMENT: usize = 4096;

/// Memory that is aligned for direct access.
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// So many bytes of it.
    pub fn bytes(&mut self, count: usize) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + count]
    }
}
