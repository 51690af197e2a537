//! The bodies of the fuzz targets of `ci/fuzz`, which the tests run on the corpus, too.

mod backend;
mod replies;
mod store;

pub use backend::hostile_backend;
pub use replies::store_replies;
pub use store::store_stream;
