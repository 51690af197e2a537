//! The bench `xen`: drivers and backends, ours and others', one after the other on the same data, in
//! one boot under the deterministic clock.
//!
//! One instruction is one nanosecond there, whoever executes it, so that the figures are a property
//! of the code.

mod back;
mod disks;
mod front;
mod machine;

pub use back::run as run_back;
pub use disks::run as run_disks;
pub use front::run as run_front;

const NAME: &str = "xen";

/// What is compared a request: name, unit, counters of ours, counters of the peer.
type Part = (&'static str, &'static str, &'static [&'static str], &'static [&'static str]);

const GUEST: [&str; 2] = ["guest-kernel", "guest-user"];
const PARTS: [Part; 11] = [
    ("instructions", "instructions", &["all"], &["all"]),
    ("guest-instructions", "instructions", &GUEST, &GUEST),
    // Without the benchmark's program, which our guest has in its kernel.
    ("guest-kernel-instructions", "instructions", &GUEST, &["guest-kernel"]),
    (
        "dom0-instructions",
        "instructions",
        &["dom0-kernel", "dom0-user"],
        &["dom0-kernel", "dom0-user"],
    ),
    ("xen-instructions", "instructions", &["xen"], &["xen"]),
    ("guest-copies", "string steps", &["guest-copies"], &["guest-copies"]),
    ("dom0-copies", "string steps", &["dom0-copies"], &["dom0-copies"]),
    ("vm-entries", "VM entries", &["vmrun"], &["vmrun"]),
    ("guest-hypercalls", "hypercalls", &["vmmcall"], &["vmmcall"]),
    ("dom0-hypercalls", "hypercalls", &["dom0-hypercalls"], &["dom0-hypercalls"]),
    ("guest-system-calls", "system calls", &["guest-syscalls"], &["guest-syscalls"]),
];
