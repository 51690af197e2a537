//! What a daemon's process has of the host, and that it is gone when the process is.
#![allow(missing_docs)]

use std::ptr::NonNull;
use std::sync::Arc;

use pvblk::memory::{Access, PageAllocator};
use pvblk_apart::{ApartHost, GuestMemory, HostServer, Worker};
use pvblk_simulated::{Domain, Host as SimulatedHost};
use pvblk_xen::platform::{
    Clock, CopyDirection, CopyOperation, DomainId, EventChannels, ForeignError, ForeignGrants,
    GrantRef, Grants, MapOperation, MappedPage, StillMapped,
};
use pvblk_xen::store::{Nodes, Store};
use pvblkd::host::{Host, Sleep};

const DAEMON: DomainId = DomainId(0);
const GUEST: DomainId = DomainId(1);

struct Scene {
    host: SimulatedHost,
    guest: Domain,
    memory: Arc<GuestMemory>,
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let host = SimulatedHost::threaded();
        host.domain(DAEMON);
        let guest = host.domain(GUEST);
        let memory = Arc::new(GuestMemory::new(8).unwrap());
        memory.give(&guest, 0, 8);
        Self { host, guest, memory, folder: tempfile::tempdir().unwrap() }
    }

    fn server(&self) -> HostServer {
        HostServer::start(&self.host, DAEMON, &self.memory, self.folder.path()).unwrap()
    }

    fn daemon(&self) -> ApartHost {
        ApartHost::new(self.folder.path().into())
    }

    fn page(&self, access: Access, bytes: &[u8]) -> (NonNull<u8>, GrantRef) {
        let page = self.guest.allocate_pages(1).unwrap();
        self.guest.poke(page, 0, bytes);
        (page, self.guest.grant(DAEMON, page, access).unwrap())
    }
}

fn map(worker: &Worker, reference: GrantRef, access: Access) -> Result<MappedPage, ForeignError> {
    let mut operations = [MapOperation::new(reference, access)];
    worker.map(GUEST, &mut operations);
    operations[0].result
}

#[test]
fn pages_are_mapped_as_they_were_granted() {
    let scene = Scene::new();
    let _server = scene.server();
    let worker = scene.daemon().worker().unwrap();
    let (page, reference) = scene.page(Access::ReadWrite, b"guest");
    let (_, for_reading) = scene.page(Access::Read, b"other");
    assert_eq!(map(&worker, for_reading, Access::ReadWrite), Err(ForeignError::Refused));
    assert_eq!(map(&worker, GrantRef(99), Access::Read), Err(ForeignError::Refused));
    let read = map(&worker, for_reading, Access::Read).unwrap();
    let mapped = map(&worker, reference, Access::ReadWrite).unwrap();
    // SAFETY: mapped above, for reading and for both.
    unsafe {
        assert_eq!(read.address.cast::<[u8; 5]>().read_volatile(), *b"other");
        assert_eq!(mapped.address.cast::<[u8; 5]>().read_volatile(), *b"guest");
        mapped.address.cast::<[u8; 5]>().write_volatile(*b"taken");
    }
    let mut bytes = [0; 5];
    scene.guest.peek(page, 0, &mut bytes);
    assert_eq!(&bytes, b"taken");
    assert_eq!(scene.guest.try_end(reference), Err(StillMapped));
    // SAFETY: mapped above, and used by nobody any more.
    unsafe { worker.unmap(&[mapped]) };
    assert_eq!(scene.guest.try_end(reference), Ok(()));
}

#[test]
fn bytes_are_copied_and_nothing_stays_mapped() {
    let scene = Scene::new();
    let _server = scene.server();
    let worker = scene.daemon().worker().unwrap();
    let (page, reference) = scene.page(Access::ReadWrite, b"0123456789");
    let local = worker.allocate_pages(1).unwrap();
    let copy = |direction, offset| {
        let result = Err(ForeignError::Refused);
        let mut operations =
            [CopyOperation { reference, offset, bytes: 4, local, direction, result }];
        // SAFETY: the page was allocated above.
        unsafe { worker.copy(GUEST, &mut operations) };
        operations[0].result
    };
    assert_eq!(copy(CopyDirection::FromPeer, 2), Ok(()));
    assert_eq!(copy(CopyDirection::ToPeer, 5), Ok(()));
    let mut bytes = [0; 10];
    scene.guest.peek(page, 0, &mut bytes);
    assert_eq!(&bytes, b"0123423459");
    assert_eq!(scene.guest.try_end(reference), Ok(()));
    assert_eq!(copy(CopyDirection::FromPeer, 0), Err(ForeignError::Refused));
    // SAFETY: allocated above, and used by nobody any more.
    unsafe { worker.release_pages(local, 1) };
}

#[test]
fn events_end_the_sleep_and_go_both_ways() {
    let scene = Scene::new();
    let _server = scene.server();
    let far = scene.guest.allocate_unbound(DAEMON).unwrap();
    scene.guest.unmask(far);
    let (daemon, guest) = (scene.daemon(), scene.guest.clone());
    let thread = std::thread::spawn(move || {
        let worker = daemon.worker().unwrap();
        let near = worker.bind_interdomain(GUEST, far).unwrap();
        // A new binding is an event.
        for _ in 0..=200 {
            worker.unmask(near);
            while !worker.take(near) {
                worker.sleep(&[], None);
            }
            worker.notify(near);
        }
        worker.unmask(near);
        let start = worker.now();
        worker.sleep(&[], Some(start + 20_000_000));
        assert!(worker.now() >= start + 20_000_000, "nothing woke it");
    });
    for _ in 0..200 {
        while !guest.take(far) {
            guest.wait(Some(guest.now() + 1_000_000_000));
        }
        guest.unmask(far);
        guest.notify(far);
    }
    thread.join().unwrap();
}

#[test]
fn a_process_that_has_ended_has_nothing() {
    let scene = Scene::new();
    let server = scene.server();
    let worker = scene.daemon().worker().unwrap();
    let (_, reference) = scene.page(Access::ReadWrite, b"");
    let far = scene.guest.allocate_unbound(DAEMON).unwrap();
    worker.bind_interdomain(GUEST, far).unwrap();
    map(&worker, reference, Access::ReadWrite).unwrap();
    // As by a kill, which the server need not have noticed.
    drop(server);
    assert_eq!(scene.guest.try_end(reference), Ok(()));
    drop(worker);
    let _server = scene.server();
    let worker = scene.daemon().worker().unwrap();
    assert!(worker.bind_interdomain(GUEST, far).is_ok(), "the channel is free again");
}

#[test]
fn xenstore_is_reached_and_its_watches_fire() {
    let scene = Scene::new();
    let _server = scene.server();
    scene.host.store_write("/some/node", "7");
    let control = scene.daemon().control().unwrap();
    let store = Store::new(&control);
    assert_eq!(store.read_u32("/some/node").unwrap(), Some(7));
    let watch = store.watch("/some/node").unwrap();
    assert!(store.wait_for(watch, Some(control.now() + 5_000_000_000)).unwrap());
    scene.host.store_write("/some/node", "8");
    assert!(store.wait_for(watch, Some(control.now() + 5_000_000_000)).unwrap());
    assert_eq!(store.read_u32("/some/node").unwrap(), Some(8));
}
