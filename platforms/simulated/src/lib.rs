//! Grant table, event channels and XenStore of a Xen host, simulated in one process
#![no_std]
