//! What the hypervisor hands over at the start.

use core::alloc::Layout;
use core::ops::Range;

use pvh::start_info::reader::{IdentityMap, MemMap, StartInfoReader};

#[cfg(target_os = "none")]
use crate::pages::PAGE_BYTES;

/// Bytes from address 0 on of which the entry code keeps a copy: page 0 is not mapped afterwards, and
/// QEMU's boot loader begins its tables there.
pub(crate) const LOW_BYTES: usize = 16 << 10;

/// Everything is where the hypervisor says, but what begins in page 0 is read from the copy.
struct LowMemoryKept;

impl MemMap for LowMemoryKept {
    fn ptr(&self, address: usize, layout: Layout) -> *const u8 {
        #[cfg(target_os = "none")]
        if address < PAGE_BYTES && layout.size() <= LOW_BYTES - PAGE_BYTES {
            unsafe extern "C" {
                static pvh_guest_low_memory: [u8; LOW_BYTES];
            }
            // SAFETY: within the copy.
            return unsafe { (&raw const pvh_guest_low_memory).cast::<u8>().add(address) };
        }
        IdentityMap.ptr(address, layout)
    }
}

/// The start info, read where it lies.
pub struct StartInfo {
    reader: StartInfoReader<'static, LowMemoryKept>,
    address: u64,
}

impl StartInfo {
    /// Reads it.
    ///
    /// # Safety
    ///
    /// `address` is what the hypervisor gave at the entry, and the first 4 GiB are mapped to
    /// themselves. The memory that [`occupied`](Self::occupied) names is not reused.
    pub unsafe fn new(address: u32) -> Option<Self> {
        // SAFETY: the caller's promise; the hypervisor vouches for the addresses inside.
        let reader = unsafe { StartInfoReader::from_paddr(address, LowMemoryKept) }?;
        Some(Self { reader, address: u64::from(address) })
    }

    /// The command line; empty if there is none, or it is not UTF-8.
    pub fn command_line(&self) -> &'static str {
        self.reader.cmdline().and_then(|line| line.to_str().ok()).unwrap_or("")
    }

    /// The memory map as (first byte, bytes, whether it is RAM).
    pub fn memory_map(&self) -> impl Iterator<Item = (u64, u64, bool)> {
        const RAM: u32 = 1;
        self.reader.memmap().iter().map(|entry| (entry.addr, entry.size, entry.ty == RAM))
    }

    /// The memory that the start info and what it points to lie in.
    pub fn occupied(&self) -> impl Iterator<Item = Range<u64>> {
        let raw = self.reader.raw();
        let range = |start: u64, bytes: u64| start..start + bytes;
        [
            range(self.address, size_of_val(raw) as u64),
            range(raw.cmdline_paddr, self.command_line().len() as u64 + 1),
            range(raw.memmap_paddr, size_of_val(self.reader.memmap()) as u64),
            range(raw.modlist_paddr, 32 * u64::from(raw.nr_modules)),
        ]
        .into_iter()
        .chain(
            self.reader.modlist().map(move |module| range(module.raw().paddr, module.raw().size)),
        )
    }

    /// The first module's bytes, if there is one: on Xen `ramdisk=` in the domain's configuration.
    pub fn module(&self) -> Option<&'static [u8]> {
        // The slice borrows from the start info's memory, which is never reused.
        self.reader.modlist().next().map(|module| {
            let bytes = module.as_slice();
            // SAFETY: as above.
            unsafe { core::slice::from_raw_parts(bytes.as_ptr(), bytes.len()) }
        })
    }
}
