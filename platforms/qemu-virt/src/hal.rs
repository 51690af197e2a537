//! What `virtio-drivers` needs to know of memory here: all of it is mapped to itself, and a device's
//! address of it is the same.

use core::ops::Range;
use core::ptr::NonNull;

use pvh_guest::pages;
use virtio_drivers::{BufferDirection, Hal, PhysAddr};

/// Maps what is above 4 GiB to itself, too.
fn map(addresses: Range<PhysAddr>) -> bool {
    #[cfg(target_os = "none")]
    {
        use pvh_guest::paging::{GIB, map_gib};

        (addresses.start / GIB..addresses.end.div_ceil(GIB)).all(map_gib)
    }
    #[cfg(not(target_os = "none"))]
    {
        let _ = addresses;
        false
    }
}

/// Memory whose address is the same for the program and for devices.
#[derive(Debug)]
pub struct IdentityHal;

fn pointer(address: PhysAddr) -> NonNull<u8> {
    let address = core::ptr::with_exposed_provenance_mut(address as usize);
    NonNull::new(address).expect("nothing is at address 0")
}

// SAFETY: pages are given out once until they are given back, and mapped to themselves.
unsafe impl Hal for IdentityHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let base = pages::allocate(pages).expect("there is memory for a virtqueue");
        (base.expose_provenance().get() as PhysAddr, base)
    }

    unsafe fn dma_dealloc(_address: PhysAddr, base: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller gives back what `dma_alloc` gave.
        unsafe { pages::release(base, pages) };
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, bytes: usize) -> NonNull<u8> {
        let end = address.saturating_add(bytes as u64);
        assert!(map(address..end), "there is memory for the tables that map a device");
        pointer(address)
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().expose_provenance().get() as PhysAddr
    }

    unsafe fn unshare(_address: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
