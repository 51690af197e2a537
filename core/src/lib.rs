//! Paravirtual block core: rings, notification hold-off, indirect descriptors, request engines
#![no_std]

pub mod memory;
