//! A daemon that serves disks to Xen guests.
fn main() {}
