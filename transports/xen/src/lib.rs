//! The Xen blkif wire: slot codecs, rings, grants, event channels, XenStore client, XenBus states
#![no_std]

pub mod platform;
