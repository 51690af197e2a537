//! What the toolstack asks of the whole domain: the node `control/shutdown`.

use pvblk_xen::store::{Error, Nodes, Store, WatchId};
use xen_guest::{Guest, println};

const NODE: &str = "control/shutdown";

/// How the domain is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// For good.
    PowerOff,
    /// To be started again.
    Reboot,
}

/// Looks after that node.
pub struct Shutdown {
    watch: WatchId,
}

impl Shutdown {
    /// Begins to watch it.
    pub fn watch(store: &Store<&'static Guest>) -> Result<Self, Error> {
        Ok(Self { watch: store.watch(NODE)? })
    }

    /// What is asked for now, if anything is; it is acknowledged by that.
    pub fn asked(&self, store: &Store<&'static Guest>) -> Result<Option<End>, Error> {
        if !store.take(self.watch) {
            return Ok(None);
        }
        let asked = store.read_optional(NODE)?.unwrap_or_default();
        let end = match asked.as_str() {
            "" => return Ok(None),
            "poweroff" | "halt" => Some(End::PowerOff),
            "reboot" => Some(End::Reboot),
            _ => None,
        };
        store.write(NODE, "")?;
        match end {
            Some(end) => println!("asked to end: {end:?}"),
            None => println!("asked to do {asked:?}, which is not possible"),
        }
        Ok(end)
    }
}
