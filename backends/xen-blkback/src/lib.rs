//! A Xen virtual block device (vbd) backend: the life cycle and the queues of an exported disk.
#![no_std]

