//! Bare-metal runtime for Xen guests: boot, memory, events, grants, XenStore, console, clock
#![no_std]
