//! A unikernel: one image, one address space, two disks. What it does with them stands here, over
//! any wire; `src/xen` and `src/virtio` are the images, each with its platform and its driver.
//!
//! It (1) mounts the ext4 file system on one disk and prints each file with its SHA-256, and (2)
//! writes, flushes, reads, compares and discards on another one, which is raw, in many sizes with many
//! requests in flight.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod files;
pub mod hammer;
pub mod machine;
pub mod many;
pub mod model;
