//! Every history up to a length: the checker allows what some run of a simulated disk gives, and
//! nothing else.
#![allow(missing_docs)]

mod model;

use model::Model;
use pvblk_history::{
    Answer, Checker, Death, Event, FlushFailure, Operation, Range, Rules, Seen, Version, Writer,
};

const SECTOR: Range = Range { first: 0, count: 1 };
const WRITE: Operation = Operation::Write(SECTOR);
const READ: Operation = Operation::Read(SECTOR);
const ZEROES: Operation = Operation::WriteZeroes(SECTOR);
const DISCARD: Operation = Operation::Discard(SECTOR);
const FLUSH: Operation = Operation::Flush;
const KEEPS: Event = Event::Died(Death::Server { keeps_cache: true });
const LOSES: Event = Event::Died(Death::Server { keeps_cache: false });

/// What histories are made of.
struct Alphabet<'a> {
    requests: &'a [(Writer, Operation)],
    others: &'a [Event],
    /// Whether requests may fail.
    fails: bool,
    /// The most requests that are not answered.
    outstanding: usize,
    rules: Rules,
}

#[derive(Clone)]
struct State {
    checker: Checker,
    model: Model,
    outstanding: Vec<(Version, Operation)>,
    versions: Vec<Version>,
    last: Version,
    history: Vec<Event>,
}

#[derive(Default, Debug)]
struct Count {
    right: usize,
    wrong: usize,
}

impl State {
    fn new(rules: Rules) -> Self {
        Self {
            checker: Checker::new(rules),
            model: Model::new(rules),
            outstanding: Vec::new(),
            versions: Vec::new(),
            last: 0,
            history: Vec::new(),
        }
    }

    /// What follows if both say that this event is right.
    fn after(&self, event: Event, count: &mut Count) -> Option<Self> {
        let mut next = self.clone();
        let (right, expected) = (next.checker.apply(&event), next.model.apply(&event));
        next.history.push(event.clone());
        assert_eq!(right.is_ok(), expected, "the checker: {right:?} of {:?}", next.history);
        if !expected {
            count.wrong += 1;
            return None;
        }
        count.right += 1;
        match event {
            Event::Submitted { id, operation, .. } => {
                next.last = id;
                next.outstanding.push((id, operation));
                if operation == WRITE {
                    next.versions.push(id);
                }
            }
            Event::Answered { id, .. } => next.outstanding.retain(|(it, _)| *it != id),
            Event::Died(Death::GuestRing | Death::Host) => next.outstanding.clear(),
            _ => {}
        }
        Some(next)
    }
}

impl Alphabet<'_> {
    fn explore(&self, length: usize) -> Count {
        let mut count = Count::default();
        self.extend(&State::new(self.rules), length, &mut count);
        count
    }

    fn extend(&self, state: &State, length: usize, count: &mut Count) {
        if length == 0 {
            return;
        }
        for event in self.next(state) {
            if let Some(next) = state.after(event, count) {
                self.extend(&next, length - 1, count);
            }
        }
    }

    fn next(&self, state: &State) -> Vec<Event> {
        let mut events = self.others.to_vec();
        for &(id, operation) in &state.outstanding {
            let mut answer = |answer| events.push(Event::Answered { id, answer });
            if operation == READ {
                answer(Answer::Read(vec![Seen::Zeroes]));
                for &version in &state.versions {
                    answer(Answer::Read(vec![Seen::Version(version)]));
                }
                continue;
            }
            answer(Answer::Done);
            if self.fails {
                answer(Answer::Failed);
            }
        }
        if state.outstanding.len() < self.outstanding {
            let id = state.last + 1;
            events.extend(self.requests.iter().map(|&(writer, operation)| Event::Submitted {
                id,
                writer,
                operation,
            }));
        }
        events
    }
}

fn rules(flush_failure: FlushFailure) -> Rules {
    Rules { sectors: 1, flush_failure, write_through: false }
}

fn explore(name: &str, alphabet: &Alphabet<'_>, length: usize) {
    let count = alphabet.explore(length);
    println!("{name}: {count:?}");
    assert!(count.right > 1000 && count.wrong > 0, "{name}: {count:?}");
}

#[test]
fn requests_that_overlap() {
    let alphabet = Alphabet {
        requests: &[(0, WRITE), (0, READ)],
        others: &[],
        fails: true,
        outstanding: 3,
        rules: rules(FlushFailure::Sticky),
    };
    explore("overlap", &alphabet, 7);
}

/// Everything that there is, but the medium's death, after which no state is wrong.
fn everything(rule: FlushFailure) -> Alphabet<'static> {
    Alphabet {
        requests: &[(0, WRITE), (1, WRITE), (0, READ), (0, FLUSH), (1, FLUSH), (0, DISCARD)],
        others: &[
            Event::Died(Death::Daemon),
            KEEPS,
            LOSES,
            Event::Died(Death::GuestRing),
            Event::Died(Death::Host),
            Event::Failing(true),
            Event::Failing(false),
            Event::Reopened,
            Event::Closed,
        ],
        fails: true,
        outstanding: 3,
        rules: rules(rule),
    }
}

#[test]
fn everything_in_short_histories() {
    explore("everything, sticky", &everything(FlushFailure::Sticky), 4);
    explore("everything, once", &everything(FlushFailure::Once), 4);
}

/// Longer ones by chance: most events are requests and their answers.
#[test]
fn everything_in_long_histories() {
    let mut random = 1_u64;
    let mut below = |bound: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (random >> 33) as usize % bound
    };
    let mut count = Count::default();
    for round in 0..600 {
        let rule = if round % 2 == 0 { FlushFailure::Sticky } else { FlushFailure::Once };
        let alphabet = Alphabet { outstanding: 2, ..everything(rule) };
        let mut state = State::new(rules(rule));
        for _ in 0..11 {
            let events = alphabet.next(&state);
            let others = if below(4) == 0 { 0 } else { alphabet.others.len() };
            let event = events[others + below(events.len() - others)].clone();
            if let Some(next) = state.after(event, &mut count) {
                state = next;
            }
        }
    }
    println!("long: {count:?}");
    assert!(count.right > 4000 && count.wrong > 20, "{count:?}");
}

#[test]
fn flushes_and_deaths() {
    for others in [
        &[Event::Died(Death::Host)],
        &[LOSES],
        &[Event::Died(Death::GuestRing)],
        &[Event::Failing(true)],
    ] {
        for rule in [FlushFailure::Sticky, FlushFailure::Once] {
            let alphabet = Alphabet {
                requests: &[(0, WRITE), (0, READ), (0, FLUSH)],
                others,
                fails: true,
                outstanding: 2,
                rules: rules(rule),
            };
            explore("deaths", &alphabet, 6);
        }
    }
}

#[test]
fn zeroes_and_write_through() {
    let alphabet = Alphabet {
        requests: &[(0, WRITE), (0, READ), (0, ZEROES), (0, DISCARD)],
        others: &[Event::Died(Death::Host)],
        fails: false,
        outstanding: 2,
        rules: Rules { write_through: true, ..rules(FlushFailure::Sticky) },
    };
    explore("zeroes", &alphabet, 6);
}

#[test]
fn failed_flushes_and_whose_they_were() {
    for rule in [FlushFailure::Sticky, FlushFailure::Once] {
        let alphabet = Alphabet {
            requests: &[(0, WRITE), (1, WRITE), (0, FLUSH), (1, FLUSH)],
            others: &[LOSES, Event::Reopened],
            fails: true,
            outstanding: 2,
            rules: rules(rule),
        };
        explore("whose", &alphabet, 6);
    }
}
