//! The Xen blkif wire: slot codecs, rings, grants, event channels, XenStore client, XenBus states
#![no_std]

extern crate alloc;

pub mod abi;
pub mod back;
pub mod foreign;
pub mod grants;
pub mod journal;
mod kept;
pub mod mapped;
pub mod platform;
pub mod store;
pub mod takeover;
pub mod wire;
pub mod xenbus;
