//! A Xen virtual block device frontend for small operating systems
#![no_std]
