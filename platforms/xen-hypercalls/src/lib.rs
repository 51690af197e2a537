//! Raw Xen hypercalls for x86_64 and aarch64 guests
#![no_std]
