//! Progress lines, and the count that a test run ends with.

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

/// Counts results, a line each.
#[derive(Default)]
pub struct Tally {
    passed: usize,
    failed: usize,
    failures: Vec<String>,
}

impl Tally {
    /// Runs one step that counts as one test.
    pub fn step(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        let result = work();
        self.note(
            name,
            start.elapsed().as_secs_f64(),
            result.err().map(|error| format!("{error:#}")),
        )
    }

    /// Notes one test's result: `reason` is there when it failed.
    pub fn note(&mut self, name: &str, seconds: f64, reason: Option<String>) -> bool {
        match reason {
            None => {
                self.passed += 1;
                println!("  ok    {name} ({seconds:.1} s)");
                true
            }
            Some(reason) => {
                self.failed += 1;
                println!("  FAIL  {name} ({seconds:.1} s)\n{}", indent(&reason));
                self.failures.push(name.to_owned());
                false
            }
        }
    }

    /// Adds tests that somebody else has counted.
    pub fn add(&mut self, name: &str, passed: usize, failed: usize) {
        self.passed += passed;
        self.failed += failed;
        if failed > 0 {
            self.failures.push(format!("{name} ({failed})"));
        }
    }

    /// Whether nothing has failed, and something has been tested at all.
    pub fn good(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// The closing lines; the count is the last one.
    pub fn close(&self) {
        println!();
        for name in &self.failures {
            println!("failed: {name}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("        {line}")).collect::<Vec<_>>().join("\n")
}
