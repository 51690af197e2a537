//! Futures.
#![allow(missing_docs)]
