//! Uses a disk from inside a Linux guest, by several threads at once, and judges every answer by the
//! history checker: `pvblk-history-client DEVICE SEED REQUESTS`.
//!
//! The disk holds zeroes at first. What dies under the disk meanwhile is the caller's affair: the guest
//! only notices that requests take their time, so the checker is told of no death, and nothing may be
//! lost. It prints
//!
//! ```text
//! HISTORY 100                       so many requests were answered
//! HISTORY end requests=... reads=... writes=... flushes=... discards=... failed=... compared=...
//! ```
//!
//! or what no correct disk can do, with the history of that sector, and ends with an error.

mod disk;
mod state;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use pvblk_history::{FlushFailure, Rules};

use disk::Disk;
use state::State;

/// Requests that are in flight together: each thread waits for its own.
const THREADS: u16 = 8;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [device, seed, requests] = &words[..] else {
        bail!("usage: pvblk-history-client DEVICE SEED REQUESTS");
    };
    let disk = Disk::open(device).with_context(|| format!("cannot use {device}"))?;
    let seed: u32 = seed.parse().context("SEED")?;
    let requests: u64 = requests.parse().context("REQUESTS")?;
    let rules = Rules {
        sectors: disk.sectors(),
        flush_failure: FlushFailure::Sticky,
        write_through: false,
    };
    let state = State::new(rules, seed, requests);
    let is_wrong = AtomicBool::new(false);
    thread::scope(|scope| {
        for writer in 0..THREADS {
            let (disk, state, is_wrong) = (&disk, &state, &is_wrong);
            scope.spawn(move || {
                let mut buffer = disk.buffer();
                while !is_wrong.load(Ordering::Relaxed) && !state.is_over() {
                    if let Err(error) = state.one_request(disk, writer, &mut buffer) {
                        is_wrong.store(true, Ordering::Relaxed);
                        println!("HISTORY wrong: {error:#}");
                    }
                }
            });
        }
    });
    if is_wrong.into_inner() {
        bail!("the disk is not what it must be");
    }
    state.read_all(&disk)?;
    println!("HISTORY end {}", state.summary());
    Ok(())
}
