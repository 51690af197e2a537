//! A daemon that serves a disk to a virtual machine over vhost-user.

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().collect();
    match vhost_user_blkd::serve::run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vhost-user-blkd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
