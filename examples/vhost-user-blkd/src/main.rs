//! A daemon that serves a disk to a virtual machine over vhost-user.
#![forbid(unsafe_code)]

mod cli;
mod disk;
mod figures;
mod serve;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match serve::serve(&cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-user-blkd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
