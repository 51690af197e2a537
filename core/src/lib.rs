//! Paravirtual block core: rings, notification hold-off, indirect descriptors, request engines.
#![no_std]

extern crate alloc;

pub mod backend;
pub mod buffer;
pub mod command;
pub mod extent;
pub mod frontend;
pub mod indirect;
pub mod memory;
pub mod plan;
pub mod ring;
mod sync;
pub mod table;
