//! A virtio-blk driver and device in two domains: all that the device reaches are pages that the
//! driver has granted.

use std::cell::Cell;
use std::ptr::NonNull;
use std::rc::Rc;

use pvblk::backend::Backend;
use pvblk::buffer::{Buffer, Pool};
use pvblk::command::{DiscardUnits, Features as DiskFeatures};
use pvblk::extent::Geometry;
use pvblk::frontend::{Frontend, IoError, Link, Request};
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PAGE_BYTES, PageAllocator, Share, ShareError, StillShared};
use pvblk::plan::RangeLimits;
use pvblk_simulated::{Domain, Host, Random};
use pvblk_stores::memory::{HostPages, MemoryDisk};
use pvblk_virtio::feature::Features;
use pvblk_virtio::grants::{GrantAddresses, GrantMemory, GrantRings};
use pvblk_virtio::queue::{Addresses, DeviceQueue, DriverQueue};
use pvblk_virtio::{Address, DeviceWire, DriverWire, Identity, limits, packed, split};
use pvblk_xen::foreign::{DataPath, ForeignMemory, Reach};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{DomainId, GrantRef};

const SECTORS: u64 = 4096;
const QUEUE: u16 = 64;
const FEATURES: Features = Features::INDIRECT.union(Features::EVENT_INDEX);
const GEOMETRY: Geometry =
    Geometry { sectors: SECTORS, logical_bytes: 512, physical_bytes: 512, read_only: false };

type Lender = GrantAddresses<GrantTo<&'static Domain>>;

#[test]
fn addresses_are_references() {
    for number in [0, 8, 0xffff, u32::MAX] {
        let address = Address::of_grant(GrantRef(number));
        assert_eq!(address.grant(), Some(GrantRef(number)));
        assert_eq!(address.0, 1 << 63 | u64::from(number) << 12);
    }
    assert_eq!(Address(0x8000).grant(), None, "guest memory is no grant");
    assert_eq!(Address(u64::MAX).grant(), None, "a reference has 32 bits");
}

/// Random requests, compared with a vector; then everything is given back.
fn hammer<Q, D>(attach: impl FnOnce(&'static Domain, Addresses) -> D)
where
    Q: DriverQueue<Share = Lender>,
    D: DeviceQueue,
{
    let host = Host::new(3);
    let front: &'static Domain = Box::leak(Box::new(host.domain(DomainId(1))));
    let back: &'static Domain = Box::leak(Box::new(host.domain(DomainId(0))));
    let grants = GrantTo::new(front, DomainId(0), u32::MAX);
    grants.set_persistent(true);
    let lender = GrantAddresses(grants);

    let queue = Q::new(lender.clone(), QUEUE, FEATURES).unwrap();
    let device = attach(back, queue.addresses());
    let tables = TablePool::new(lender.clone(), 16, 1, Access::ReadWrite).unwrap();
    let wire = DriverWire::new(queue, lender.clone(), FEATURES).unwrap();
    let limits = limits(QUEUE, 254, PAGE_BYTES as u32, 256, RangeLimits::NONE);
    let features = DiskFeatures {
        flush: true,
        discard: Some(DiscardUnits { granularity: 1, alignment: 0 }),
        write_zeroes: true,
        ..DiskFeatures::default()
    };
    let mut engine: Frontend<_> = Frontend::new(32, GEOMETRY, features);
    engine.attach(Link { wire, limits, tables }, GEOMETRY, features);

    let reach = Reach {
        path: DataPath::Copy,
        kept_pages: 2048,
        kept_references: 32768,
        kept_unused: 1_000_000,
        room: 512,
    };
    let memory = GrantMemory::new(ForeignMemory::new(back, DomainId(1), &reach).unwrap());
    let disk = MemoryDisk::new(HostPages, GEOMETRY).unwrap();
    let wire = DeviceWire::new(device, Identity::default(), 254);
    let mut server = Backend::new(wire, memory, disk, QUEUE, 254);

    let pool = Pool::new(lender.clone(), 16, 1 << 20).unwrap();
    let mut model = vec![0u8; SECTORS as usize * 512];
    let mut random = Random::new(9);
    for _ in 0..400 {
        let mut under_way = Vec::new();
        for part in 0..8 {
            // Each has a part of the disk to itself.
            let sectors = 1 + random.below(511);
            let sector = part * 512 + random.below(512 - sectors);
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            let request = match random.below(6) {
                0..2 => {
                    model[range.clone()].fill(random.below(256) as u8);
                    let mut buffer = pool.take().unwrap();
                    buffer.write(0, &model[range.clone()]);
                    Request::Write { sector, sectors: sectors as u32, buffer: buffer.into() }
                }
                2..4 => {
                    let buffer = pool.take().unwrap().into();
                    Request::Read { sector, sectors: sectors as u32, buffer }
                }
                4 => Request::Flush,
                _ => {
                    model[range.clone()].fill(0);
                    Request::WriteZeroes { sector, sectors, may_unmap: true }
                }
            };
            under_way.push((engine.submit(request).unwrap(), range));
        }
        while !under_way.is_empty() {
            engine.commit();
            server.poll(8).unwrap();
            while let Some(done) = engine.next().unwrap() {
                done.result.unwrap();
                let place = under_way.iter().position(|(tag, _)| *tag == done.tag).unwrap();
                let (_, range) = under_way.swap_remove(place);
                if let Some(Buffer::Registered(buffer)) = done.buffer {
                    let mut bytes = vec![0; range.len()];
                    buffer.read(0, &mut bytes);
                    assert!(bytes == model[range]);
                }
            }
        }
    }
    assert_eq!(server.statistics().errors, 0);

    drop(server);
    drop((engine, pool));
    front.assert_nothing_left();
    back.assert_nothing_left();
    assert_eq!(host.incidents(), Vec::<String>::new());
}

#[test]
fn a_split_queue_in_granted_pages() {
    hammer::<split::DriverQueue<Lender>, _>(|back, addresses| {
        let rings = GrantRings::split(back, DomainId(1), addresses, QUEUE).unwrap();
        split::DeviceQueue::attach(rings, QUEUE, FEATURES, 0).unwrap()
    });
}

#[test]
fn a_packed_queue_in_granted_pages() {
    hammer::<packed::DriverQueue<Lender>, _>(|back, addresses| {
        let rings = GrantRings::packed(back, DomainId(1), addresses, QUEUE).unwrap();
        packed::DeviceQueue::attach(rings, QUEUE, FEATURES, 0x8000, 0x8000).unwrap()
    });
}

/// Shares some pages with another domain than the device is.
#[derive(Clone)]
struct Mistaken {
    right: Lender,
    wrong: Lender,
    is_wrong: Rc<Cell<bool>>,
}

impl Mistaken {
    fn lender(&self) -> &Lender {
        if self.is_wrong.get() { &self.wrong } else { &self.right }
    }
}

// SAFETY: both are the same domain's.
unsafe impl PageAllocator for Mistaken {
    fn allocate_pages(&self, count: usize) -> Option<NonNull<u8>> {
        self.right.allocate_pages(count)
    }

    unsafe fn release_pages(&self, base: NonNull<u8>, count: usize) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.right.release_pages(base, count) }
    }
}

// SAFETY: both lenders revoke what they have granted, by the same table.
unsafe impl Share for Mistaken {
    type Handle = Address;

    fn share(&self, page: NonNull<u8>, access: Access) -> Result<Address, ShareError> {
        self.lender().share(page, access)
    }

    fn unshare(&self, handle: Address) -> Result<(), StillShared> {
        self.right.unshare(handle)
    }
}

#[test]
fn what_is_not_granted_is_out_of_reach() {
    let host = Host::new(4);
    let front: &'static Domain = Box::leak(Box::new(host.domain(DomainId(1))));
    let back: &'static Domain = Box::leak(Box::new(host.domain(DomainId(0))));
    let to = |domain| GrantAddresses(GrantTo::new(front, DomainId(domain), u32::MAX));
    let lender = Mistaken { right: to(0), wrong: to(7), is_wrong: Rc::default() };
    let queue = split::DriverQueue::new(lender.clone(), QUEUE, FEATURES).unwrap();
    let at = queue.addresses();
    // Areas that are no grants, that are not granted, or that leave their page.
    for address in [0x1000, Address::of_grant(GrantRef(4711)).0, at.descriptors + 3500] {
        let moved = Addresses { descriptors: address, ..at };
        assert!(GrantRings::split(back, DomainId(1), moved, QUEUE).is_err(), "{address:#x}");
    }
    let rings = GrantRings::split(back, DomainId(1), at, QUEUE).unwrap();
    let device = split::DeviceQueue::attach(rings, QUEUE, FEATURES, 0).unwrap();
    let reach = Reach {
        path: DataPath::Copy,
        kept_pages: 64,
        kept_references: 32768,
        kept_unused: 1_000_000,
        room: 64,
    };
    let memory = GrantMemory::new(ForeignMemory::new(back, DomainId(1), &reach).unwrap());
    let disk = MemoryDisk::new(HostPages, GEOMETRY).unwrap();
    let wire = DeviceWire::new(device, Identity::default(), 16);
    let mut server = Backend::new(wire, memory, disk, QUEUE, 16);
    let wire = DriverWire::new(queue, lender.clone(), FEATURES).unwrap();
    let limits = limits(QUEUE, 16, PAGE_BYTES as u32, 256, RangeLimits::NONE);
    let features = DiskFeatures::default();
    let mut engine: Frontend<_> = Frontend::new(4, GEOMETRY, features);
    let tables = TablePool::empty();
    engine.attach(Link { wire, limits, tables }, GEOMETRY, features);
    for (is_wrong, expected) in [(true, Err(IoError::Device)), (false, Ok(()))] {
        lender.is_wrong.set(is_wrong);
        let pool = Pool::new(lender.clone(), 1, PAGE_BYTES).unwrap();
        let buffer = pool.take().unwrap().into();
        engine.submit(Request::Read { sector: 0, sectors: 8, buffer }).unwrap();
        engine.commit();
        server.poll(8).unwrap();
        let done = engine.next().unwrap().unwrap();
        assert_eq!(done.result, expected);
        // The device lets go of what it keeps, and the pages go back.
        server.tidy(u64::MAX / 2);
    }
    assert_eq!(server.statistics().errors, 1);
}
