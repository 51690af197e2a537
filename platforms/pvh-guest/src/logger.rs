//! A `log` logger that prints to the console.

use log::{LevelFilter, Log, Metadata, Record};

use crate::runtime;

struct ConsoleLogger;

static LOGGER: ConsoleLogger = ConsoleLogger;

/// Starts logging, at the level that the command line names (`log=debug`), else at `info`.
pub fn start(level: Option<&str>) {
    let level = level.and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::Info);
    // An error means that there is a logger already, which is as well.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for ConsoleLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let microseconds = runtime::now() / 1000;
            runtime::print(format_args!(
                "[{:>6}.{:06}] {:<5} {}: {}\n",
                microseconds / 1_000_000,
                microseconds % 1_000_000,
                record.level(),
                record.target(),
                record.args(),
            ));
        }
    }

    fn flush(&self) {}
}
