//! The parts of `vhost-user-blkd`, a daemon that serves a disk to a virtual machine over vhost-user.
#![forbid(unsafe_code)]

pub mod cli;
mod disk;
mod figures;
pub mod file;
pub mod serve;
