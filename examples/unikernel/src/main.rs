//! A one-image OS.
fn main() {}
