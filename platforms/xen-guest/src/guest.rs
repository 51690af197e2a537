//! The guest: what the program's main function gets.

use core::ops::Range;

use pvh_guest::command_line::argument;
use pvh_guest::pages;
use pvh_guest::ram::Ram;

use crate::foreign::Window;
use crate::grants::GrantTable;
use crate::store::Store;
use crate::{PortStatistics, Statistics, clock, events};

/// The running guest.
///
/// There is one, made before the program's main function is called. It implements the platform
/// traits of `pvblk-xen` and so is all that a block driver needs.
pub struct Guest {
    pub(crate) grants: GrantTable,
    pub(crate) foreign: Window,
    pub(crate) store: Store,
    command_line: &'static str,
    module: Option<&'static [u8]>,
    ram: Ram,
}

impl Guest {
    /// The command line that the domain was started with; empty if there is none.
    #[must_use]
    pub fn command_line(&self) -> &'static str {
        self.command_line
    }

    /// The value of `key=value` in the command line, whose words are separated by blanks; the last
    /// one counts.
    #[must_use]
    pub fn argument(&self, key: &str) -> Option<&'static str> {
        argument(self.command_line, key)
    }

    /// The module (`ramdisk=` in the domain's configuration), if there is one.
    #[must_use]
    pub fn module(&self) -> Option<&'static [u8]> {
        self.module
    }

    /// The guest's RAM: ranges of guest-physical addresses in bytes, as the hypervisor reported it.
    #[must_use]
    pub fn ram(&self) -> &[Range<u64>] {
        self.ram.ranges()
    }

    /// Makes room for `pages` pages of other domains, besides those that are mapped now: mapping
    /// them takes no memory then. Without this, room is made as it is needed: a page of memory for
    /// 1024 mappings.
    ///
    /// `false` if there is not enough memory or address space (4 GiB of it are used at most).
    #[must_use]
    pub fn reserve_foreign(&self, pages: usize) -> bool {
        self.foreign.reserve(pages)
    }

    /// What was counted so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        use core::sync::atomic::Ordering::Relaxed;

        let (upcalls, events_received, notifications_sent) = events::totals();
        let foreign = &self.foreign.counts;
        Statistics {
            upcalls,
            events_received,
            notifications_sent,
            grants_made: self.grants.counts.granted.load(Relaxed),
            grants_ended: self.grants.counts.ended.load(Relaxed),
            grants_still_mapped: self.grants.counts.still_mapped.load(Relaxed),
            foreign_pages: self.foreign.in_use(),
            maps: foreign.maps.load(Relaxed),
            map_calls: foreign.map_calls.load(Relaxed),
            unmaps: foreign.unmaps.load(Relaxed),
            unmap_calls: foreign.unmap_calls.load(Relaxed),
            copies: foreign.copies.load(Relaxed),
            copy_calls: foreign.copy_calls.load(Relaxed),
            free_pages: pages::free(),
            hypercalls: xen_hypercalls::count::total(),
        }
    }

    /// What was counted for one event channel since it was opened.
    #[must_use]
    pub fn port_statistics(&self, port: pvblk_xen::platform::Port) -> PortStatistics {
        let (received, sent) = events::counts(port.0);
        PortStatistics { received, sent }
    }

    /// Nanoseconds of Xen's system time.
    #[must_use]
    pub fn now(&self) -> u64 {
        clock::now()
    }
}

#[cfg(target_os = "none")]
pub(crate) use start::start;

/// The way from the entry code to the program.
#[cfg(target_os = "none")]
mod start {
    use core::cell::UnsafeCell;
    use core::mem::MaybeUninit;

    use pvh_guest::pages::{self, PAGE_BYTES};
    use pvh_guest::ram::Ram;
    use pvh_guest::{FIRST_VECTOR, StartInfo, interrupts, paging};
    use xen_hypercalls::grant_table;
    use xen_hypercalls::hvm::{self, Parameter};
    use xen_hypercalls::memory::{self, MapSpace};

    use super::Guest;
    use crate::foreign::{Machine, Window};
    use crate::grants::{ENTRIES_PER_FRAME, GrantTable};
    use crate::store::Store;
    use crate::{console, events};

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const FOUR_GIB: u64 = 1 << 32;
    /// Interrupt controllers and the pages shared with the toolstack's daemons are above.
    const HIGHEST_GAP: u64 = 0xf000_0000;

    struct GuestCell(UnsafeCell<MaybeUninit<Guest>>);

    // SAFETY: written once, by `start`, before there is anybody else; shared references only, after.
    unsafe impl Sync for GuestCell {}

    static GUEST: GuestCell = GuestCell(UnsafeCell::new(MaybeUninit::uninit()));

    unsafe extern "Rust" {
        /// The program's main function: see `entry!`.
        safe fn xen_guest_main(guest: &'static Guest) -> !;
    }

    /// Called once, by the entry code.
    pub(crate) fn start(info: &StartInfo) -> ! {
        // SAFETY: nothing else uses the RAM yet: interrupts are off, and this is the start.
        let ram = unsafe { Ram::take(info) };
        let size = grant_table::query_size().expect("the grant table has a size");
        let table_bytes = u64::from(size.max_frames) * PAGE_BYTES as u64;
        // The shared page, then the grant table.
        let shared = find_place(info, PAGE_BYTES as u64 + table_bytes);
        TABLE_FRAME.store(shared / PAGE_BYTES as u64 + 1, core::sync::atomic::Ordering::Relaxed);
        // SAFETY: nobody uses that place, and its addresses are mapped to themselves.
        unsafe {
            memory::add_to_physmap(MapSpace::SharedInfo, 0, shared / PAGE_BYTES as u64)
                .expect("the shared page can be mapped");
            events::start(address(shared).cast());
        }
        start_console();

        let references = (size.max_frames * ENTRIES_PER_FRAME) as usize;
        let stack = pages::allocate((references * size_of::<u32>()).div_ceil(PAGE_BYTES))
            .expect("there is memory for the free list of grants");
        // SAFETY: the pages were just allocated and are not given back; the table's address space
        // follows the shared page.
        let grants = unsafe {
            let stack = core::slice::from_raw_parts_mut(stack.cast::<u32>().as_ptr(), references);
            let table = address(shared + PAGE_BYTES as u64);
            GrantTable::new(table, size.max_frames, map_grant_frame, stack)
        };

        let store_frame = hvm::parameter(Parameter::StoreFrame).unwrap_or(0);
        let store_port = hvm::parameter(Parameter::StorePort).unwrap_or(0) as u32;
        let store_page = if store_frame == 0 || store_frame >= FOUR_GIB / PAGE_BYTES as u64 {
            // There is no XenStore (yet): an empty page of our own, to which nobody answers.
            pages::allocate(1).expect("there is memory").as_ptr()
        } else {
            address(store_frame * PAGE_BYTES as u64)
        };
        // SAFETY: the toolstack made this page for XenStore, or it was just allocated.
        let store = unsafe { Store::new(store_page, store_port) };

        // SAFETY: the handler of the vector is in place.
        unsafe { hvm::set_parameter(Parameter::CallbackIrq, hvm::callback_vector(FIRST_VECTOR)) }
            .expect("events can be delivered as an interrupt vector");
        events::start_timer().expect("the timer can be bound");

        #[cfg(feature = "heap")]
        pvh_guest::heap::start();
        #[cfg(feature = "log")]
        pvh_guest::logger::start(super::argument(info.command_line(), "log"));

        let guest = Guest {
            grants,
            foreign: foreign_window(info),
            store,
            command_line: info.command_line(),
            module: info.module(),
            ram,
        };
        // SAFETY: written here, once; shared from now on.
        let guest = unsafe { (*GUEST.0.get()).write(guest) };
        interrupts::enable();
        xen_guest_main(guest)
    }

    /// The frame where the grant table starts in the guest's physical memory.
    static TABLE_FRAME: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);

    fn map_grant_frame(index: u32) -> bool {
        let frame = TABLE_FRAME.load(core::sync::atomic::Ordering::Relaxed) + u64::from(index);
        // SAFETY: `start` set the frames from there on apart for the grant table.
        unsafe { memory::add_to_physmap(MapSpace::GrantTable, index.into(), frame) }.is_ok()
    }

    /// The address space above everything in the memory map.
    fn foreign_window(info: &StartInfo) -> Window {
        let ends = info.memory_map().map(|(start, bytes, _)| start.saturating_add(bytes));
        let end = ends.max().unwrap_or(0).clamp(FOUR_GIB, paging::MOST);
        let machine = Machine { allocate: || pages::allocate(1), map_gib: paging::map_gib };
        Window::new(end.next_multiple_of(GIB), paging::end_of_addresses(), machine)
    }

    /// Memory is mapped to itself.
    fn address(physical: u64) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(physical as usize)
    }

    /// Guest-physical addresses below 4 GiB for pages of the hypervisor: the first gap in the memory
    /// map that is large enough, or else RAM, which the hypervisor's pages then replace.
    fn find_place(info: &StartInfo, bytes: u64) -> u64 {
        let ends = info.memory_map().map(|(start, bytes, _)| start.saturating_add(bytes));
        let gap = ends.map(|end| end.next_multiple_of(2 * MIB)).filter(|start| {
            let gap = *start..start.saturating_add(bytes);
            gap.end <= HIGHEST_GAP
                && info.memory_map().all(|(other, bytes, _)| {
                    other.saturating_add(bytes) <= gap.start || gap.end <= other
                })
        });
        gap.min().unwrap_or_else(|| {
            let pages = pages::allocate((bytes as usize).div_ceil(PAGE_BYTES));
            pages.expect("there is memory below 4 GiB for the grant table").addr().get() as u64
        })
    }

    /// Starts the console, if the toolstack made one.
    fn start_console() {
        let frame = hvm::parameter(Parameter::ConsoleFrame).unwrap_or(0);
        let port = hvm::parameter(Parameter::ConsolePort).unwrap_or(0) as u32;
        if frame != 0 && frame < FOUR_GIB / PAGE_BYTES as u64 && port != 0 {
            // SAFETY: the toolstack made this page for the console; every port is masked.
            unsafe { console::start(address(frame * PAGE_BYTES as u64), port) };
        }
    }
}
