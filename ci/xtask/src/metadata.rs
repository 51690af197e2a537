//! What cargo knows of the workspace's crates.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::project;
use crate::shell;

/// A crate of the workspace.
#[derive(Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its features and what they enable.
    pub features: BTreeMap<String, Vec<String>>,
    /// Registries it may be published to: all when absent, none when empty.
    publish: Option<Vec<String>>,
    /// The oldest compiler it is for.
    pub rust_version: Option<String>,
}

impl Package {
    /// Whether it is a library for others.
    pub fn is_published(&self) -> bool {
        self.publish.as_ref().is_none_or(|registries| !registries.is_empty())
    }

    /// Its features, but `default`.
    pub fn feature_names(&self) -> Vec<&str> {
        self.features.keys().map(String::as_str).filter(|name| *name != "default").collect()
    }

    /// All features that go together: everything but `defmt`, which excludes `log`.
    pub fn additive_features(&self) -> Vec<&str> {
        self.feature_names().into_iter().filter(|name| *name != "defmt").collect()
    }
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

/// The workspace's crates that are libraries for others.
pub fn published() -> Result<Vec<Package>> {
    let text = shell::output(Command::new("cargo").current_dir(project::root()).args([
        "metadata",
        "--no-deps",
        "--format-version",
        "1",
    ]))?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("cannot read what cargo says of the workspace")?;
    Ok(metadata.packages.into_iter().filter(Package::is_published).collect())
}
