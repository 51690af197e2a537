//! Tries all of this crate on the Xen that it runs on, with this domain at both ends: XenStore by
//! both ways, event channels between two workers, grants of our own that are mapped and copied.
//!
//! It needs root, and a domain that may map its own grants: a PV dom0. `cargo xtask test --only xen`
//! runs it there. The last line is the verdict.

mod events;
mod grants;
mod store;

use std::process::ExitCode;
use std::time::Instant;

use pvblk_xen::platform::DomainId;

/// This domain: the tests are about dom0.
const SELF: DomainId = DomainId(0);

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A test and its name.
type Test = (&'static str, fn() -> Outcome);

/// Fails the test unless something is true.
#[macro_export]
macro_rules! check {
    ($true:expr) => {
        if !$true {
            return Err(format!("{}:{}: not so: {}", file!(), line!(), stringify!($true)).into());
        }
    };
}

/// Fails the test unless two things are equal.
#[macro_export]
macro_rules! check_eq {
    ($left:expr, $right:expr) => {
        match (&$left, &$right) {
            (left, right) if left == right => {}
            (left, right) => {
                let what = stringify!($left);
                return Err(
                    format!("{}:{}: {what} is {left:?}, not {right:?}", file!(), line!()).into()
                );
            }
        }
    };
}

fn main() -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in [store::TESTS, events::TESTS, grants::TESTS].concat() {
        let start = Instant::now();
        let result = test();
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("ok    {name} ({seconds:.2} s)");
            }
            Err(error) => {
                failed += 1;
                println!("FAIL  {name} ({seconds:.2} s): {error}");
            }
        }
    }
    println!("{} {passed} passed, {failed} failed", if failed == 0 { "PASS" } else { "FAIL" });
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
