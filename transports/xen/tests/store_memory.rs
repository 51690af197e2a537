//! How much memory the XenStore client takes, however many events come. A test alone in its
//! program, because it counts every allocation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use pvblk_xen::platform::{Clock, StoreBroken, StoreTransport};
use pvblk_xen::store::Store;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that this needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those that this needs.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Answers the request for a watch, then sends events of it and of others.
struct Flood {
    events: [Vec<u8>; 2],
    left: Cell<usize>,
    current: RefCell<Vec<u8>>,
    position: Cell<usize>,
    time: Cell<u64>,
}

fn message(kind: u32, request: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_le_bytes();
    [&kind.to_le_bytes(), request, &[0; 4], &length, payload].concat()
}

impl StoreTransport for Flood {
    type Lock = pvblk_xen::platform::NoopRawMutex;

    fn send(&self, bytes: &[u8]) -> Result<usize, StoreBroken> {
        let mut current = self.current.borrow_mut();
        current.clear();
        current.extend(message(4, &bytes[4..8], b"OK\0"));
        self.position.set(0);
        Ok(bytes.len())
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<usize, StoreBroken> {
        let mut current = self.current.borrow_mut();
        if self.position.get() == current.len() {
            let Some(left) = self.left.get().checked_sub(1) else { return Ok(0) };
            self.left.set(left);
            current.clear();
            current.extend(&self.events[left % 2]);
            self.position.set(0);
        }
        let rest = &current[self.position.get()..];
        let count = bytes.len().min(rest.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        self.position.set(self.position.get() + count);
        Ok(count)
    }

    fn wait_store(&self, deadline: Option<u64>) {
        self.time.set(deadline.unwrap());
    }

    fn set_store_waker(&self, _: &Waker) {}
}

impl Clock for Flood {
    fn now(&self) -> u64 {
        self.time.get()
    }
}

#[test]
fn takes_no_memory_for_events() {
    let long_path = [vec![b'x'; 4000], b"\0unknown\0".to_vec()].concat();
    let flood = Flood {
        events: [message(15, &[0; 4], b"a\x000.0\0"), message(15, &[0; 4], &long_path)],
        left: Cell::new(0),
        current: RefCell::new(Vec::with_capacity(5000)),
        position: Cell::new(0),
        time: Cell::new(0),
    };
    let store = Store::new(&flood);
    let watch = store.watch("a").unwrap();
    assert!(!store.poll().unwrap());

    let before = ALLOCATIONS.load(Ordering::Relaxed);
    flood.left.set(100_000);
    let mut fired = 0;
    while flood.left.get() > 0 {
        store.poll().unwrap();
        fired += usize::from(store.take(watch));
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert!(fired > 1);
    // None is the client's. The test harness's own thread may make a few meanwhile.
    assert!(allocations < 100, "{allocations} allocations for 100000 events");
}
