//! The body of the fuzz target `hostile_frontend` of `ci/fuzz`, which the tests run on the corpus, too.

mod frontend;
#[path = "../raw/mod.rs"]
pub mod raw;
mod script;

pub use frontend::hostile_frontend;
#[allow(unused_imports, reason = "the fuzz target has no use for it")]
pub use frontend::hostile_threads;
