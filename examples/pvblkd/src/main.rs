//! A daemon that serves disks to Xen guests, and the commands that go with it.

use std::process::ExitCode;

use clap::Parser;
use pvblkd::cli::{Cli, Command};
use pvblkd::host::Xen;
use pvblkd::{commands, serve};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(options) => serve::serve(options, Xen),
        Command::Check(options) => commands::check(&options),
        Command::Attach(options) => commands::attach(&options),
        Command::Detach(options) => commands::detach(&options),
        Command::Resize(options) => commands::resize(&options),
        Command::Limit(options) => commands::limit(&options),
        Command::Top(options) => commands::top(&options),
        Command::List(options) => commands::list(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pvblkd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
