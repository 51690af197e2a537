//! Messages, to the standard error: lines for people, or objects for programs.
//!
//! A message about a disk of Xen begins with the backend's directory, whoever writes it: a library knows
//! nothing else. People know a disk by its guest and its name there ([`name`]), and read those.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{PoisonError, RwLock};
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

/// What disks are called, by their backends' directories.
static NAMES: RwLock<BTreeMap<String, String>> = RwLock::new(BTreeMap::new());

/// From now on messages that begin with `path` show `name`: `web xvdb`.
pub fn name(path: &str, name: String) {
    let mut names = NAMES.write().unwrap_or_else(PoisonError::into_inner);
    names.insert(path.into(), name);
}

/// There is no such disk any more.
pub fn forget(path: &str) {
    NAMES.write().unwrap_or_else(PoisonError::into_inner).remove(path);
}

/// A message, in parts.
struct Parts<'m> {
    /// The backend's directory, if it is about a disk.
    path: Option<&'m str>,
    /// What the disk is called, if that is known.
    name: Option<String>,
    rest: &'m str,
}

impl<'m> Parts<'m> {
    fn of(message: &'m str) -> Self {
        let disk = message.split_once(": ").filter(|(path, _)| path.starts_with("/local/domain/"));
        let Some((path, rest)) = disk else {
            return Self { path: None, name: None, rest: message };
        };
        let names = NAMES.read().unwrap_or_else(PoisonError::into_inner);
        Self { path: Some(path), name: names.get(path).cloned(), rest }
    }
}

/// A message for people.
fn line(record: &Record<'_>) -> String {
    let message = record.args().to_string();
    match Parts::of(&message) {
        Parts { name: Some(name), rest, .. } => format!("{name}: {rest}"),
        _ => message,
    }
}

/// Sends messages of this level and above to the standard error.
pub fn start(format: LogFormat, level: LevelFilter) {
    let mut builder = Builder::new();
    // What is below the level is not even made: that may change while it runs.
    builder.filter_level(LevelFilter::Trace).target(Target::Stderr);
    // What journald is told of a line's importance, if that is where it goes.
    let to_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    builder.format(move |out, record| match format {
        LogFormat::Json => writeln!(out, "{}", json(record, seconds())),
        LogFormat::Text if to_journal => {
            writeln!(out, "<{}>{}", priority(record), line(record))
        }
        LogFormat::Text => writeln!(out, "{:5} {}", record.level(), line(record)),
    });
    // A second start would be a mistake of ours that harms nobody.
    let _ = builder.try_init();
    log::set_max_level(level);
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

/// A message as an object.
fn json(record: &Record<'_>, seconds: f64) -> serde_json::Value {
    let message = record.args().to_string();
    let parts = Parts::of(&message);
    let mut object = serde_json::json!({
        "time": (seconds * 1e3).round() / 1e3,
        "level": record.level().as_str().to_lowercase(),
        "from": record.target(),
        "message": parts.rest,
    });
    if let Some(path) = parts.path {
        object["disk"] = path.into();
    }
    if let Some(name) = parts.name {
        object["name"] = name.into();
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<R>(message: &str, work: impl FnOnce(&Record<'_>) -> R) -> R {
        let args = format_args!("{message}");
        work(&Record::builder().level(log::Level::Warn).target("pvblkd").args(args).build())
    }

    fn object(message: &str) -> String {
        with(message, |record| json(record, 12.3456).to_string())
    }

    #[test]
    fn disks_are_called_what_people_call_them() {
        let path = "/local/domain/0/backend/vbd/7/51728";
        let message = format!("{path}: closed");
        assert_eq!(with(&message, line), message);
        name(path, "web xvdb".into());
        assert_eq!(with(&message, line), "web xvdb: closed");
        let text = object(&message);
        assert!(text.contains("\"name\":\"web xvdb\"") && text.contains(path), "{text}");
        assert_eq!(with("something else: closed", line), "something else: closed");
        forget(path);
        assert_eq!(with(&message, line), message);
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
