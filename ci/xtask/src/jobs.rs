//! Work that goes on side by side: an emulated machine keeps one processor busy, and no more.

use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use anyhow::Result;

use crate::report::Tally;

/// Work to be done once, by any thread.
type Work<'a> = Box<dyn FnOnce(&Tally) -> Result<()> + Send + 'a>;

/// A piece of work that notes its own results; when it fails as a whole, that is noted for it.
pub struct Job<'a> {
    name: String,
    work: Work<'a>,
}

impl<'a> Job<'a> {
    /// Work that notes as many results as it likes.
    pub fn new(
        name: impl Into<String>,
        work: impl FnOnce(&Tally) -> Result<()> + Send + 'a,
    ) -> Self {
        Self { name: name.into(), work: Box::new(work) }
    }

    /// Work that counts as one test.
    pub fn step(name: &'a str, work: impl FnOnce() -> Result<()> + Send + 'a) -> Self {
        Self::new(name, move |tally| {
            tally.step(name, work);
            Ok(())
        })
    }
}

/// Does all of `jobs`, as many at a time as there are processors. They are begun in their order: the
/// longest should come first, so that no processor waits for another in the end. `busy` is what one
/// of the processors has to do before.
pub fn run(jobs: Vec<Job<'_>>, busy: Option<ScopedJoinHandle<'_, ()>>, tally: &Tally) {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let waiting = Mutex::new(jobs.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(job) = next() {
            if let Err(error) = (job.work)(tally) {
                tally.note(&job.name, 0.0, Some(format!("{error:#}")));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        if busy.is_some_and(|busy| busy.join().is_err()) {
            tally.note("what was begun first", 0.0, Some("it panicked".to_owned()));
        }
        work();
    });
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn each_job_is_done_once_and_failures_are_noted() {
        let tally = Tally::default();
        let mut jobs: Vec<Job<'_>> = (0..20)
            .map(|number| {
                Job::new(format!("job {number}"), move |tally| {
                    tally.note(&format!("test {number}"), 0.0, None);
                    Ok(())
                })
            })
            .collect();
        jobs.push(Job::step("one that fails", || bail!("as it should")));
        jobs.push(Job::new("another", |_| bail!("before it noted anything")));
        let good = Mutex::new(false);
        thread::scope(|scope| {
            let busy = scope.spawn(|| *good.lock().unwrap() = true);
            run(jobs, Some(busy), &tally);
        });
        assert!(*good.lock().unwrap());
        assert_eq!(tally.counts(), (20, 2));
    }
}
