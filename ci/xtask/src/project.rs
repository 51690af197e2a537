//! Where things are.

use std::path::PathBuf;

/// The workspace's root: two folders above this crate.
pub fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.ancestors().nth(2).map_or_else(|| manifest.clone(), PathBuf::from)
}

/// Build output. Everything that is made or fetched lies under it.
pub fn target() -> PathBuf {
    root().join("target")
}

/// What is fetched and prepared for the machine that boots Xen.
pub fn rig() -> PathBuf {
    target().join("rig")
}

/// The shell scripts that run inside that machine.
pub fn rig_scripts() -> PathBuf {
    root().join("ci/rig")
}
