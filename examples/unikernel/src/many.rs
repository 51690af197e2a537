//! Many requests in flight over all queues of a disk.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pvblk::frontend::queue::{BufferOf, Channel, Line, Queue};
use pvblk::frontend::{Completion, Request};

use crate::machine::Machine;

/// The queues of a disk, and who is in flight on them.
pub struct Many<'q, M, C: Channel, K> {
    machine: &'q M,
    queues: &'q mut [Queue<C>],
    /// What the caller knows of each request, by queue and slot.
    known: Vec<Vec<Option<K>>>,
    turn: usize,
    in_flight: usize,
}

/// A request that is done, and what its submitter knew of it.
pub struct Done<C: Channel, K> {
    /// What was submitted with it.
    pub known: K,
    /// How it went.
    pub completion: Completion<BufferOf<C>>,
}

impl<'q, M: Machine, C: Channel, K> Many<'q, M, C, K> {
    /// Nothing is in flight at first.
    pub fn new(machine: &'q M, queues: &'q mut [Queue<C>]) -> Self {
        let slots = |queue: &Queue<C>| (0..queue.frontend.capacity()).map(|_| None).collect();
        let known = queues.iter().map(slots).collect();
        Self { machine, queues, known, turn: 0, in_flight: 0 }
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits a request on the next queue that takes one more.
    pub fn submit(&mut self, request: Request<BufferOf<C>>, known: K) -> Result<(), String> {
        for _ in 0..self.queues.len() {
            self.turn = (self.turn + 1) % self.queues.len();
            let frontend = &self.queues[self.turn].frontend;
            if frontend.pending() < frontend.capacity() {
                break;
            }
        }
        let tag = self.queues[self.turn]
            .submit(request)
            .map_err(|rejected| format!("a request was not taken: {rejected}"))?;
        self.known[self.turn][tag.slot()] = Some(known);
        self.in_flight += 1;
        Ok(())
    }

    /// The next request that is done; sleeps until there is one.
    pub fn wait(&mut self) -> Result<Done<C, K>, String> {
        loop {
            for number in 0..self.queues.len() {
                if let Some(done) = self.poll(number)? {
                    return Ok(done);
                }
            }
            let mut awake = false;
            for queue in self.queues.iter_mut() {
                queue.commit();
                queue.line().listen();
                awake |= queue.sleep_batched().map_err(|error| error.to_string())?;
            }
            if !awake {
                self.machine.wait();
            }
        }
    }

    fn poll(&mut self, number: usize) -> Result<Option<Done<C, K>>, String> {
        let Some(completion) = self.queues[number].poll().map_err(|error| error.to_string())?
        else {
            return Ok(None);
        };
        let known = self.known[number][completion.tag.slot()].take();
        let known = known.ok_or("a request finished that nobody submitted")?;
        self.in_flight -= 1;
        Ok(Some(Done { known, completion }))
    }
}
