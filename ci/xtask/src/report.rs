//! Progress lines, and the count that a test run ends with.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Result;

/// One line about what is going on.
pub fn say(text: impl AsRef<str>) {
    println!("  {}", text.as_ref());
}

/// A heading above a group of steps.
pub fn heading(text: &str) {
    println!("\n== {text}");
}

/// Counts results, a line each. What goes on side by side shares it.
#[derive(Default)]
pub struct Tally(Mutex<Counts>);

#[derive(Default)]
struct Counts {
    passed: usize,
    failed: usize,
    failures: Vec<String>,
}

impl Tally {
    /// Runs one step that counts as one test.
    pub fn step(&self, name: &str, work: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        let result = work();
        self.note(
            name,
            start.elapsed().as_secs_f64(),
            result.err().map(|error| format!("{error:#}")),
        )
    }

    /// Notes one test's result: `reason` is there when it failed.
    pub fn note(&self, name: &str, seconds: f64, reason: Option<String>) -> bool {
        let mut counts = self.lock();
        match reason {
            None => {
                counts.passed += 1;
                println!("  ok    {name} ({seconds:.1} s)");
                true
            }
            Some(reason) => {
                counts.failed += 1;
                println!("  FAIL  {name} ({seconds:.1} s)\n{}", indent(&reason));
                counts.failures.push(name.to_owned());
                false
            }
        }
    }

    /// Adds tests that somebody else has counted.
    pub fn add(&self, name: &str, passed: usize, failed: usize) {
        let mut counts = self.lock();
        counts.passed += passed;
        counts.failed += failed;
        if failed > 0 {
            counts.failures.push(format!("{name} ({failed})"));
        }
    }

    /// How many have passed and failed.
    pub fn counts(&self) -> (usize, usize) {
        let counts = self.lock();
        (counts.passed, counts.failed)
    }

    /// Whether nothing has failed, and something has been tested at all.
    pub fn good(&self) -> bool {
        let (passed, failed) = self.counts();
        failed == 0 && passed > 0
    }

    /// The closing lines; the count is the last one.
    pub fn close(&self) {
        let counts = self.lock();
        println!();
        for name in &counts.failures {
            println!("failed: {name}");
        }
        println!("{} passed, {} failed", counts.passed, counts.failed);
    }

    /// Whoever panicked with it in hand had changed nothing yet.
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("        {line}")).collect::<Vec<_>>().join("\n")
}
