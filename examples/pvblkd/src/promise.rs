//! What a disk is served from, so that it can be told from another one in its place.
//!
//! The vbd keeps it in XenStore while a guest is connected, and a later daemon serves nothing else to
//! that guest.

use anyhow::{Result, bail};

use crate::backing::Backing;
use crate::opening::{NamedMemory, Opening};
use crate::runtime::Runtime;
use crate::source::Source;

/// What a disk is served from, opened.
#[derive(Debug)]
pub struct Opened {
    /// The disk.
    pub backing: Backing,
    /// What no other disk has that could be in its place.
    pub identity: String,
}

/// Opens `source`, and says what it is.
///
/// # Errors
///
/// Whatever is wrong, with what to do about it.
pub fn open(
    opening: &Opening,
    source: &Source,
    runtime: &Runtime,
    named: &NamedMemory,
) -> Result<Opened> {
    // Before and after: a file that is exchanged meanwhile is not taken for the other one. What
    // cannot be looked at cannot be opened either, and that error says more.
    let before = source.identity().ok();
    let backing = opening.open(source, runtime, named)?;
    let identity = source.identity()?;
    if before.as_ref() != Some(&identity) {
        bail!("{source} was exchanged for another one while it was opened");
    }
    Ok(Opened { backing, identity })
}
