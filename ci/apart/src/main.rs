//! `pvblkd serve` on the simulated host of another process.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pvblk_apart::ApartHost;
use pvblkd::cli::Serve;
use pvblkd::serve;

/// Serves disks as `pvblkd serve` does, with another process in Xen's place
#[derive(Parser)]
#[command(name = "pvblkd-apart")]
struct Options {
    /// The folder in which that process listens
    #[arg(long, value_name = "FOLDER")]
    host: PathBuf,
    /// What `pvblkd serve` takes
    #[command(flatten)]
    serve: Serve,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match serve::serve(options.serve, ApartHost::new(options.host)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pvblkd-apart: {error:#}");
            ExitCode::FAILURE
        }
    }
}
