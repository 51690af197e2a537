//! A disk of this domain that is forwarded: a frontend, whose queues other guests' queues use.

use alloc::format;
use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::cell::RefCell;

use pvblk::backend::Store as _;
use pvblk::memory::PagesError;
use pvblk_xen::store::Store;
use xen_blkfront::{Change, Config, Connection, Disk, Queues};
use xen_guest::{Guest, println};

use crate::medium::OwnQueue;
use crate::target::device_name;

/// Registered buffers of each queue, and their size. With its tables that is within the 1056 pages
/// that Linux's backend keeps mapped of a queue.
const BUFFERS: u32 = 24;
const BUFFER_BYTES: usize = 128 << 10;
/// Operations in flight on each queue.
const DEPTH: u16 = 128;

/// The queues of a disk, each of which somebody else may have.
#[derive(Clone)]
struct Shared(Vec<Rc<RefCell<OwnQueue>>>);

impl Queues<&'static Guest> for Shared {
    fn for_each(&mut self, work: &mut dyn FnMut(usize, &mut dyn Connection<&'static Guest>)) {
        for (number, queue) in self.0.iter().enumerate() {
            work(number, queue.borrow_mut().queue_mut());
        }
    }
}

/// What became of a disk.
pub enum News {
    /// Nothing that concerns those who are served from it.
    Nothing,
    /// It may be slower or faster, or have other event channels: everything in flight is to be
    /// looked at.
    Stirred,
    /// It has another size.
    Resized,
    /// It goes, or is gone: nobody can be served from it any more.
    Leaving,
}

/// A disk of this domain.
pub struct OwnDisk {
    /// Its virtual device number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Whether somebody is served from it: one vbd at a time.
    pub is_taken: bool,
    /// Whether it goes, or is gone.
    pub is_leaving: bool,
    disk: Disk<&'static Guest>,
    queues: Shared,
}

impl OwnDisk {
    /// Connects the disk. Dropped before that is done, it leaves the device as it is.
    pub async fn connect(
        store: Store<&'static Guest>,
        guest: &'static Guest,
        number: u32,
        queues: u32,
    ) -> Result<Self, String> {
        let config = Config { queues, ring_order: 2, bounce_buffers: 0, ..Config::default() };
        let connected = Disk::connect_async(&store, guest, number, &config).await;
        let (mut disk, mut connected) = connected.map_err(|error| error.to_string())?;
        let pools = connected.iter().map(|_| disk.register(BUFFERS, BUFFER_BYTES)).collect();
        let pools: Vec<_> = match pools {
            Ok(pools) => pools,
            Err(error) => {
                // What went wrong first matters more.
                let _ = disk.close(&mut connected);
                return Err(PagesError::to_string(&error));
            }
        };
        let queue = |(queue, pool)| Rc::new(RefCell::new(OwnQueue::new(queue, pool, DEPTH)));
        let queues = Shared(connected.into_iter().zip(pools).map(queue).collect());
        let name = device_name(number);
        Ok(Self { number, name, is_taken: false, is_leaving: false, disk, queues })
    }

    /// Its queues.
    pub fn queues(&self) -> Vec<Rc<RefCell<OwnQueue>>> {
        self.queues.0.clone()
    }

    /// Follows the disk's backend. It never waits for that.
    pub fn follow(&mut self) -> Result<News, String> {
        let change = self.disk.advance(&mut self.queues);
        let change = change.map_err(|error| format!("{}: {error}", self.name))?;
        let (what, news) = match change {
            Change::Nothing => return Ok(News::Nothing),
            Change::Connected => ("is connected again", News::Stirred),
            Change::Disconnected => ("has lost its backend; requests wait", News::Stirred),
            Change::Resized(_) => ("has another size", News::Resized),
            Change::ClosingRequested => ("is asked to close", News::Leaving),
            Change::Removed => ("was taken away", News::Leaving),
            _ => return Ok(News::Nothing),
        };
        println!("{self}: {what}");
        self.is_leaving |= matches!(news, News::Leaving);
        Ok(news)
    }

    /// Closes the disk, and sleeps until its backend has let go of it.
    pub fn close(&mut self) {
        match self.disk.close(&mut self.queues) {
            Ok(()) => println!("{self}: closed"),
            Err(error) => println!("{self}: closing: {error}"),
        }
    }
}

impl core::fmt::Display for OwnDisk {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Some(queue) = self.queues.0.first() else { return write!(f, "own {}", self.name) };
        let geometry = queue.borrow().geometry();
        let mode = if geometry.read_only { ", read-only" } else { "" };
        write!(f, "own {} ({} MiB{mode})", self.name, geometry.sectors >> 11)
    }
}
