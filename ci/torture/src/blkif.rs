//! A guest of `pvblkd`, on a simulated host.

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use anyhow::{Context, Result, bail};
use pvblk::buffer::{OwnedPages, Piece, Pool};
use pvblk::frontend::{Completion, Request, SubmitError};
use pvblk::table::Tag;
use pvblk_apart::{GuestMemory, HostServer};
use pvblk_simulated::{Domain, Host, Random, Vbd};
use pvblk_xen::platform::DomainId;
use pvblk_xen::store::Store;
use pvblk_xen::xenbus;
use xen_blkfront::{Buffer, Change, Config, Disk, Error, FrontQueue, Lender};

use crate::client::DEPTH;
use crate::guest::{Attempt, Guest, Memory};
use crate::medium::{Place, Source};
use crate::plan::Plan;

/// Where the daemon runs.
const DAEMON: DomainId = DomainId(0);
const GUEST: DomainId = DomainId(1);
/// `xvda`
const DEVICE: u32 = 51712;

/// Pages for rings and tables. A new kernel has its rings where the one before had them.
const RING_PAGES: usize = 1024;
/// Pages for data, of each kernel. The host may still be at work on writes of the one before, from its
/// very pages.
const DATA_PAGES: usize = 2048;

type XenBuffer = Buffer<Rc<Domain>>;
type Connected = (Disk<Rc<Domain>>, Vec<FrontQueue<Rc<Domain>>>);

type Connecting = Pin<Box<dyn Future<Output = Result<Connected, Error>>>>;

/// The program of the guest.
struct Kernel {
    /// How many there were before it.
    number: usize,
    connecting: Option<Connecting>,
    connected: Option<Connected>,
    /// One for each queue.
    pools: Vec<Arc<Pool<Lender<Rc<Domain>>>>>,
    config: Config,
    /// How many attempts go by before it begins: the daemon sees what the kernel before has left.
    idle: u64,
    store: Store<Rc<Domain>>,
    domain: Rc<Domain>,
}

impl Kernel {
    fn start(
        number: usize,
        plan: &Plan,
        host: &Host,
        memory: &GuestMemory,
        random: &mut Random,
    ) -> Self {
        let domain = Rc::new(host.domain(GUEST));
        memory.give(&domain, 0, RING_PAGES);
        let store = Store::new(domain.clone());
        let config = Config {
            queues: plan.queues.into(),
            ring_order: random.below(5) as u32,
            indirect_segments: if random.one_in(3) { 0 } else { 256 },
            persistent: !random.one_in(3),
            bounce_buffers: 0,
            ..Config::default()
        };
        let idle = if random.one_in(2) { 0 } else { random.below(20) };
        let (connecting, connected, pools) = Default::default();
        Self { number, connecting, connected, pools, config, idle, store, domain }
    }

    /// Goes on with its way to the disk. `true` if it is there.
    fn connect(&mut self, plan: &Plan, memory: &GuestMemory) -> Result<bool> {
        let (store, domain) = (self.store.clone(), self.domain.clone());
        let config = self.config.clone();
        let begin = async move { Disk::connect_async(&store, domain, DEVICE, &config).await };
        let connecting = self.connecting.get_or_insert_with(|| Box::pin(begin));
        // It is asked again and again.
        let mut context = std::task::Context::from_waker(Waker::noop());
        let Poll::Ready(result) = connecting.as_mut().poll(&mut context) else { return Ok(false) };
        self.connecting = None;
        let (disk, queues) = result?;
        let found = disk.negotiated().map(|it| it.properties.geometry);
        let is_it = found.is_some_and(|found| {
            (found.sectors, found.logical_bytes) == (plan.bytes() / 512, plan.sector_bytes)
        });
        if !is_it {
            bail!("another disk than was configured: {found:?}");
        }
        memory.give(&self.domain, RING_PAGES + self.number * DATA_PAGES, DATA_PAGES);
        let bytes_each = XenGuest::LONGEST as usize + 4096;
        let pools = queues.iter().map(|_| disk.register(DEPTH as u32, bytes_each));
        self.pools = pools.collect::<Result<_, _>>()?;
        self.connected = Some((disk, queues));
        Ok(true)
    }

    fn queue(&mut self, lane: usize) -> Result<&mut FrontQueue<Rc<Domain>>> {
        let queues = self.connected.as_mut().map(|(_, queues)| queues);
        queues.and_then(|queues| queues.get_mut(lane)).context("the guest has no such queue")
    }
}

/// A guest with our Xen frontend, and its host.
pub struct XenGuest {
    /// While there is a daemon.
    server: Option<HostServer>,
    kernel: Kernel,
    plan: Plan,
    program: PathBuf,
    folder: PathBuf,
    vbd: Vbd,
    host: Host,
    memory: Arc<GuestMemory>,
    /// Decides what kernels are like.
    random: Random,
}

impl XenGuest {
    /// Whether the daemon still has the disk.
    fn follow(&mut self) -> Result<()> {
        let Some((disk, queues)) = &mut self.kernel.connected else { return Ok(()) };
        let change = disk.advance(queues).context("XenStore")?;
        if change == Change::Nothing {
            return Ok(());
        }
        let error = xenbus::error_path(&self.vbd.backend_path());
        let error = self.host.store_read(&error).unwrap_or_default();
        bail!("the daemon does not keep the disk: {change:?}, {error:?}");
    }
}

impl Drop for XenGuest {
    fn drop(&mut self) {
        self.server = None;
        // What the kernel has is not given back in an orderly way.
        self.host.kill_program(GUEST);
    }
}

/// Copies bytes into a buffer, or out of it.
fn write_at(buffer: &mut XenBuffer, offset: usize, bytes: &[u8]) {
    match buffer {
        Buffer::Registered(buffer) => buffer.write(offset, bytes),
        Buffer::Owned(pages) => {
            let all = pages.bytes_mut().expect("pages that came back");
            all[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        Buffer::List(pieces) => {
            let [piece] = &mut **pieces else { panic!("one piece, as it was made") };
            write_at(&mut piece.buffer, piece.offset as usize + offset, bytes);
        }
        _ => panic!("a buffer that is not made here"),
    }
}

fn read_at(buffer: &mut XenBuffer, offset: usize, bytes: &mut [u8]) {
    match buffer {
        Buffer::Registered(buffer) => buffer.read(offset, bytes),
        Buffer::Owned(pages) => {
            let all = pages.bytes_mut().expect("pages that came back");
            bytes.copy_from_slice(&all[offset..offset + bytes.len()]);
        }
        Buffer::List(pieces) => {
            let [piece] = &mut **pieces else { panic!("one piece, as it was made") };
            read_at(&mut piece.buffer, piece.offset as usize + offset, bytes);
        }
        _ => panic!("a buffer that is not made here"),
    }
}

impl Memory for XenBuffer {
    fn write(&mut self, bytes: &[u8]) {
        write_at(self, 0, bytes);
    }

    fn read(&mut self, bytes: &mut [u8]) {
        read_at(self, 0, bytes);
    }
}

impl Guest for XenGuest {
    type Buffer = XenBuffer;

    /// More segments than fit in a request that has no table.
    const LONGEST: u32 = 64 << 10;

    fn new(plan: &Plan, place: &Place, program: &Path, folder: &Path) -> Result<Self> {
        let host = Host::threaded();
        host.domain(DAEMON);
        host.domain(GUEST);
        let mut vbd = Vbd::new(DAEMON, GUEST, DEVICE);
        vbd.class = "pvblk".into();
        vbd.params = match place.source() {
            Source::Memory if plan.named => format!("memory:torture:{}", plan.bytes()),
            Source::Memory => format!("memory:{}", plan.bytes()),
            Source::File(path) => path,
            Source::Nbd(url) => url,
        };
        host.attach_vbd(&vbd);
        // As many kernels as there can be. Pages that are not used are none.
        let kernels = 1 + plan.lives as usize;
        let memory = Arc::new(GuestMemory::new(RING_PAGES + kernels * DATA_PAGES)?);
        let mut random = Random::new(plan.seed ^ 0x6b_6572_6e65_6c73);
        let kernel = Kernel::start(0, plan, &host, &memory, &mut random);
        let (program, folder) = (program.to_owned(), folder.to_owned());
        fs::create_dir_all(folder.join("run"))?;
        let (server, plan) = (None, plan.clone());
        Ok(Self { server, kernel, plan, program, folder, vbd, host, memory, random })
    }

    fn daemon(&mut self, place: &Place, random: &mut Random) -> Result<Command> {
        self.server = Some(HostServer::start(&self.host, DAEMON, &self.memory, &self.folder)?);
        let mut command = Command::new(&self.program);
        command.arg("--host").arg(&self.folder).args(["--vbd", "no"]);
        command.arg("--runtime").arg(self.folder.join("run"));
        let queues = 1 + random.below(3);
        command.args(["--queues", &queues.to_string()]);
        command.args(["--ring-order", &random.below(5).to_string()]);
        command.args(["--segments", ["0", "32", "256"][random.index(3)]]);
        command.args(["--sector", &self.plan.sector_bytes.to_string()]);
        if random.one_in(3) {
            command.arg("--no-persistent");
        }
        if random.one_in(2) {
            command.arg("--map");
        }
        command.args(place.arguments(random));
        Ok(command)
    }

    fn attempt(&mut self) -> Result<Attempt> {
        if self.kernel.connected.is_some() {
            // A guest that goes on sees nothing of the daemon's exchange.
            self.follow()?;
            return Ok(Attempt::Connected);
        }
        let not_yet = |reason| Ok(Attempt::NotYet { reason, has_begun: false });
        if self.kernel.idle > 0 {
            self.kernel.idle -= 1;
            return not_yet(None);
        }
        match self.kernel.connect(&self.plan, &self.memory) {
            Ok(true) => Ok(Attempt::Connected),
            Ok(false) => not_yet(None),
            Err(error) => not_yet(Some(error)),
        }
    }

    fn disconnect(&mut self) -> bool {
        false
    }

    fn daemon_died(&mut self) {
        self.server = None;
    }

    fn kexec(&mut self) -> Result<()> {
        self.host.kill_program(GUEST);
        let Self { plan, host, memory, random, .. } = self;
        self.kernel = Kernel::start(self.kernel.number + 1, plan, host, memory, random);
        // Some kernels close first what they find. Others begin at once, with a backend that is there as
        // far as XenStore knows.
        let state = |path| host.store_read(&format!("{path}/state"));
        let is_there = state(self.vbd.backend_path()).as_deref() == Some("4");
        if random.one_in(2) && is_there {
            host.store_write(&format!("{}/state", self.vbd.frontend_path()), "1");
            if !self.kernel.connect(plan, memory)? {
                bail!("the new kernel waits for a backend that is connected");
            }
        }
        Ok(())
    }

    fn lanes(&self) -> usize {
        self.kernel.pools.len()
    }

    fn take(&mut self, lane: usize, random: &mut Random) -> Result<Option<XenBuffer>> {
        let unit = self.plan.sector_bytes;
        let is_lent = random.one_in(2);
        let offset = match self.plan.misaligned && random.one_in(2) {
            true => unit * (1 + random.below(u64::from(4096 / unit)) as u32),
            false => 0,
        };
        let (disk, _) = self.kernel.connected.as_ref().context("the guest has no disk")?;
        let is_persistent = disk.negotiated().is_none_or(|it| it.persistent);
        let buffer: XenBuffer = if is_lent && !is_persistent {
            OwnedPages::new(disk.lender(), Self::LONGEST as usize + 4096)?.into()
        } else {
            let Some(buffer) = self.kernel.pools[lane].take() else { return Ok(None) };
            buffer.into()
        };
        if offset == 0 {
            return Ok(Some(buffer));
        }
        let piece = Piece { buffer, offset, bytes: Self::LONGEST };
        Ok(Some(Buffer::List(Box::new([piece]))))
    }

    fn submit(&mut self, lane: usize, request: Request<XenBuffer>) -> Result<Tag, SubmitError> {
        match self.kernel.queue(lane) {
            Ok(queue) => queue.submit(request).map_err(|rejected| rejected.error),
            Err(_) => Err(SubmitError::Closed),
        }
    }

    fn commit(&mut self, lane: usize) -> Result<()> {
        self.kernel.queue(lane)?.commit();
        Ok(())
    }

    fn poll(&mut self, lane: usize) -> Result<Option<Completion<XenBuffer>>> {
        self.kernel.queue(lane)?.poll().context("the daemon lies")
    }

    fn idle(&mut self) -> Result<()> {
        for lane in 0..self.lanes() {
            let queue = self.kernel.queue(lane)?;
            queue.sleep_batched().context("the daemon lies")?;
        }
        self.follow()
    }
}
