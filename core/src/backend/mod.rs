//! The backend engine: requests off the wire, input and output by a store, answers back.

mod memory;
mod store;
mod wire;

pub use memory::{Lease, PeerMemory};
pub use store::{Completed, Operation, Requests, Store, StoreError, Submitted};
pub use wire::{Incoming, List, Malformed, Violation, Wire};
