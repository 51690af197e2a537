//! The configuration file of `pvblkd serve`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use pvblk_daemon::logging::LogFormat;

use crate::document::{Document, Problems};
use crate::http::Address;
use crate::options::DiskOptions;
use crate::source::Source;

/// What the configuration file says. Everything may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Where Prometheus finds the counters: `127.0.0.1:9470` or `unix:/PATH`.
    pub metrics: Option<String>,
    /// Whether each worker is pinned to a processor.
    pub pin: Option<bool>,
    /// `text` or `json`.
    pub log: Option<LogFormat>,
    /// Messages of this level and above: `error`, `warn`, `info`, `debug`.
    pub log_level: Option<log::LevelFilter>,
    /// The user to become.
    pub user: Option<String>,
    /// Where what must survive the daemon is kept.
    pub runtime: Option<PathBuf>,
    /// Whether `backend/vbd` is served.
    pub vbd: Option<ServeVbd>,
    /// Settings of all disks.
    #[serde(skip)]
    pub defaults: DiskOptions,
    /// Settings of some disks.
    #[serde(skip)]
    pub disk: Vec<DiskSettings>,
}

/// Whether `backend/vbd` is served, where xen-blkback serves it if that is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ServeVbd {
    /// Unless xen-blkback is loaded
    #[default]
    Auto,
    /// Yes, and it is an error if xen-blkback is loaded
    Yes,
    /// No: only disks of `pvblkd attach`
    No,
}

/// Settings of the disks with a certain target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSettings {
    /// Which disks: those that are served from this.
    pub target: Source,
    /// The settings.
    pub options: DiskOptions,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// If it cannot be read; all mistakes in it, with their lines.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::parse(&text).map_err(|problems| anyhow!("{}:\n{problems}", path.display()))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// All mistakes in it.
    pub fn parse(text: &str) -> Result<Self, Problems> {
        let (mut document, table) = Document::parse(text);
        let (mut own, mut defaults, mut disks) = (DeTable::new(), DeTable::new(), Vec::new());
        for (key, value) in table {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("defaults", DeValue::Table(table)) => defaults = table.clone(),
                ("disk", DeValue::Array(array)) => disks = array.iter().cloned().collect(),
                ("defaults", _) => document.note("defaults", key.span(), "[defaults] is expected"),
                ("disk", _) => document.note("disk", key.span(), "[[disk]] is expected"),
                _ => drop(own.insert(key, value)),
            }
        }
        let mut config: Self = document.settings("", own, Self::check_alone);
        config.defaults = document.settings("defaults.", defaults, |options: &DiskOptions| {
            options.check().map_err(|error| error.to_string())
        });
        config.disk = disks.into_iter().filter_map(|disk| settings(&mut document, disk)).collect();
        document.finish().map(|()| config)
    }

    /// What can be said of a setting without the others.
    fn check_alone(&self) -> Result<(), String> {
        match &self.metrics {
            Some(address) => {
                address.parse::<Address>().map(drop).map_err(|error| error.to_string())
            }
            None => Ok(()),
        }
    }

    /// The settings of the daemon that `other` says differently, and that do not change while it runs.
    pub fn fixed_differences(&self, other: &Self) -> Vec<&'static str> {
        [
            ("metrics", self.metrics != other.metrics),
            ("pin", self.pin != other.pin),
            ("log", self.log != other.log),
            ("user", self.user != other.user),
            ("runtime", self.runtime != other.runtime),
            ("vbd", self.vbd != other.vbd),
        ]
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect()
    }

    /// The level of messages.
    pub fn level(&self) -> log::LevelFilter {
        self.log_level.unwrap_or(log::LevelFilter::Info)
    }

    /// The settings of a disk that is served from `source`, with those of all disks where it has
    /// none of its own.
    pub fn options(&self, source: &Source) -> DiskOptions {
        let own =
            self.disk.iter().find(|disk| disk.target == *source).map(|disk| disk.options.clone());
        own.unwrap_or_default().or(&self.defaults)
    }
}

/// Reads a `[[disk]]`.
fn settings<'t>(document: &mut Document<'t>, disk: Spanned<DeValue<'t>>) -> Option<DiskSettings> {
    let span = disk.span();
    let DeValue::Table(table) = disk.into_inner() else {
        document.note("disk", span, "a table, [[disk]], is expected");
        return None;
    };
    let (mut rest, mut target) = (DeTable::new(), None);
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "target" => target = Some((key.span(), value.get_ref().as_str().map(str::to_owned))),
            _ => drop(rest.insert(key, value)),
        }
    }
    let Some((span, target)) = target else {
        document.note("disk", span, "a [[disk]] without target");
        return None;
    };
    let source = target.as_deref().unwrap_or_default().parse::<Source>();
    let source = source.map_err(|error| document.note("disk.target", span, error)).ok();
    let options = document.settings("disk.", rest, |options: &DiskOptions| {
        options.check().map_err(|error| error.to_string())?;
        match &source {
            Some(source) => options.check_source(source).map_err(|error| error.to_string()),
            None => Ok(()),
        }
    });
    source.map(|target| DiskSettings { target, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_example_of_everything() {
        let config = Config::parse(include_str!("../pvblkd.toml")).unwrap();
        assert_eq!(config.metrics.as_deref(), Some("127.0.0.1:9470"));
        assert_eq!(config.log_level, Some(log::LevelFilter::Info));
        let own = config.options(&"/srv/xen/database.img".parse().unwrap());
        assert_eq!((own.sector, own.queues), (Some(4096), Some(4)));
        let other = config.options(&"memory:64M".parse().unwrap());
        assert_eq!((other.sector, other.queues), (None, Some(4)));
    }

    #[test]
    fn nothing_is_a_configuration() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let text = "pin = 3\n[defaults]\nqueues = 0\nsector = 513\n\n[[disk]]\ntarget = \"/x\"\n\
                    nbd-settle = 3\n[[disk]]\ntarget = \"x\"\n";
        let Problems(problems) = Config::parse(text).unwrap_err();
        let places: Vec<_> =
            problems.iter().map(|problem| (problem.line, &*problem.field)).collect();
        assert_eq!(
            places,
            [
                (1, "pin"),
                (3, "defaults.queues"),
                (4, "defaults.sector"),
                (8, "disk.nbd-settle"),
                (10, "disk.target")
            ]
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            ("metric = \"x\"", "metric"),
            ("[defaults]\nsector = 100", "sector is 100"),
            ("[defaults]\nsectors = 512", "sectors"),
            ("[[disk]]\ntarget = \"disk.img\"", "disk.img"),
            ("[[disk]]\ntarget = \"/x\"\nqueues = 65", "queues is 65"),
            ("[[disk]]\ntarget = \"/x\"\ncolour = 1", "colour"),
            ("[[disk]]\ntarget = \"memory:1M\"\nbuffered = true", "buffered is for files"),
            ("[[disk]]\ntarget = \"/x\"\nformat = \"qcow2\"", "qcow2"),
            ("[[disk]]\ntarget = \"/x\"\nnbd-durability = \"trusted\"", "NBD servers"),
            ("log = \"xml\"", "xml"),
            ("metrics = \"0.0.0.0:9470\"", "can be reached by others"),
            ("defaults = 3", "[defaults] is expected"),
            ("disk = 3", "[[disk]] is expected"),
            ("[[disk]]\nqueues = 3", "without target"),
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
