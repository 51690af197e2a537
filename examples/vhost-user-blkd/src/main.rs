//! A daemon that serves a disk to a virtual machine over vhost-user.
#![forbid(unsafe_code)]

mod cli;
mod disk;
mod figures;
mod file;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    match serve::run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-user-blkd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
