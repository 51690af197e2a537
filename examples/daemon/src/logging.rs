//! Messages, to the standard error: lines for people, or objects for programs.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use env_logger::{Builder, Target};
use log::{LevelFilter, Record};
use serde::Deserialize;

/// How messages look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// Sends messages of this level and above to the standard error.
pub fn start(format: LogFormat, level: LevelFilter) {
    let mut builder = Builder::new();
    builder.filter_level(level).target(Target::Stderr);
    // What journald is told of a line's importance, if that is where it goes.
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    builder.format(move |out, record| match format {
        LogFormat::Json => writeln!(out, "{}", json(record, seconds())),
        LogFormat::Text if to_journal => {
            writeln!(out, "<{}>{}", priority(record), record.args())
        }
        LogFormat::Text => writeln!(out, "{:5} {}", record.level(), record.args()),
    });
    // A second start would be a mistake of ours that harms nobody.
    let _ = builder.try_init();
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The priority of syslog.
fn priority(record: &Record<'_>) -> u8 {
    match record.level() {
        log::Level::Error => 3,
        log::Level::Warn => 4,
        log::Level::Info => 6,
        log::Level::Debug | log::Level::Trace => 7,
    }
}

/// A message as an object. What our own messages begin with is the backend's directory of a disk.
fn json(record: &Record<'_>, seconds: f64) -> serde_json::Value {
    let message = record.args().to_string();
    let disk = message.split_once(": ").filter(|(path, _)| path.starts_with("/local/domain/"));
    let (disk, message) = match disk {
        Some((disk, rest)) => (Some(disk), rest),
        None => (None, &*message),
    };
    let mut object = serde_json::json!({
        "time": (seconds * 1e3).round() / 1e3,
        "level": record.level().as_str().to_lowercase(),
        "from": record.target(),
        "message": message,
    });
    if let Some(disk) = disk {
        object["disk"] = disk.into();
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(message: &str) -> String {
        let args = format_args!("{message}");
        let record = Record::builder().level(log::Level::Warn).target("pvblkd").args(args).build();
        json(&record, 12.3456).to_string()
    }

    #[test]
    fn messages_are_objects() {
        assert_eq!(
            object("hello \"you\""),
            r#"{"from":"pvblkd","level":"warn","message":"hello \"you\"","time":12.346}"#
        );
        let path = "/local/domain/0/backend/vbd/1/51712";
        let text = object(&format!("{path}: queue 0: lies"));
        assert!(text.contains(&format!("\"disk\":\"{path}\"")), "{text}");
        assert!(text.contains("\"message\":\"queue 0: lies\""), "{text}");
    }
}
