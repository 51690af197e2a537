//! The configuration file of `pvblkd serve`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

pub use pvblk_daemon::logging::LogFormat;

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
    pub defaults: DiskOptions,
    /// Settings of some disks.
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct DiskSettings {
    /// Which disks: those that are served from this.
    pub target: String,
    /// The settings.
    pub options: DiskOptions,
}

impl TryFrom<toml::Table> for DiskSettings {
    type Error = String;

    fn try_from(mut table: toml::Table) -> Result<Self, String> {
        let Some(toml::Value::String(target)) = table.remove("target") else {
            return Err("a [[disk]] without target".into());
        };
        let options = table.try_into().map_err(|error| format!("{target}: {}", error.message()))?;
        Ok(Self { target, options })
    }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or says something that makes no sense; then the error says where.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in the configuration {}", path.display()))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.defaults.check().context("in [defaults]")?;
        for disk in &config.disk {
            let place = || format!("in [[disk]] of {:?}", disk.target);
            let source = disk.target.parse::<Source>().with_context(place)?;
            disk.options.check().with_context(place)?;
            disk.options.check_source(&source).with_context(place)?;
        }
        Ok(config)
    }

    /// The settings of a disk that is served from `source`, with those of all disks where it has
    /// none of its own.
    pub fn options(&self, source: &Source) -> DiskOptions {
        let same = |disk: &&DiskSettings| disk.target.parse().as_ref() == Ok(source);
        let own = self.disk.iter().find(same).map(|disk| disk.options.clone());
        own.unwrap_or_default().or(&self.defaults)
    }
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
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
