//! `HYPERVISOR_xen_version`: version and features (`version.h`, `features.h`).

use core::mem::size_of;

use crate::{Errno, Hypercall, raw};

/// `XENVER_version`.
const VERSION: usize = 0;
/// `XENVER_get_features`.
const GET_FEATURES: usize = 6;

/// `XENFEAT_auto_translated_physmap`: Xen translates guest frames (HVM, PVH, Arm).
pub const FEATURE_AUTO_TRANSLATED_PHYSMAP: u32 = 2;
/// `XENFEAT_hvm_callback_vector`: events can be delivered as an interrupt vector.
pub const FEATURE_HVM_CALLBACK_VECTOR: u32 = 8;
/// `XENFEAT_hvm_safe_pvclock`: the time in the shared page can be used by an HVM guest.
pub const FEATURE_HVM_SAFE_PVCLOCK: u32 = 9;
/// `XENFEAT_dom0`: the calling domain is the control domain.
pub const FEATURE_DOM0: u32 = 11;

/// `struct xen_feature_info`.
#[repr(C)]
struct FeatureInfo {
    submap_index: u32,
    submap: u32,
}

const _: () = assert!(size_of::<FeatureInfo>() == 8);

/// The hypervisor's major and minor version.
///
/// # Errors
///
/// None known; what Xen says is passed on.
pub fn version() -> Result<(u16, u16), Errno> {
    // SAFETY: the operation takes no structure.
    let word = raw::result(unsafe { raw::hypercall2(Hypercall::XenVersion, VERSION, 0) })?;
    Ok(((word >> 16) as u16, word as u16))
}

/// Whether the hypervisor offers one of the features `FEATURE_*` (0 to 31).
///
/// # Errors
///
/// None known; what Xen says is passed on.
pub fn has_feature(feature: u32) -> Result<bool, Errno> {
    let mut argument = FeatureInfo { submap_index: feature / 32, submap: 0 };
    // SAFETY: Xen reads and writes the structure only.
    unsafe { raw::operation(Hypercall::XenVersion, GET_FEATURES, &mut argument) }?;
    Ok(argument.submap & (1 << (feature % 32)) != 0)
}
