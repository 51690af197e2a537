//! Steps that are done once, and again when what they depend on has changed.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::report::say;

/// Does `work` unless `stamp` holds `key` already; the stamp is written last.
pub fn once(stamp: &Path, key: &str, what: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    if fs::read_to_string(stamp).is_ok_and(|found| found == key) {
        return Ok(());
    }
    let _ = fs::remove_file(stamp);
    if let Some(folder) = stamp.parent() {
        fs::create_dir_all(folder)?;
    }
    let start = Instant::now();
    say(format!("{what} ..."));
    work().with_context(|| what.to_owned())?;
    fs::write(stamp, key).with_context(|| format!("cannot write {}", stamp.display()))?;
    say(format!("{what}: done ({:.1} s)", start.elapsed().as_secs_f64()));
    Ok(())
}

/// Empties `folder`, or makes it.
pub fn fresh(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}
