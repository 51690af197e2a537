//! A disk of one sector that is simulated step by step: requests are performed, contents are written
//! back, the cache is dropped. A history is right if some run of that disk gives it.
#![allow(missing_docs)]

use std::collections::BTreeSet;

use pvblk_history::{Answer, Death, Event, FlushFailure, Operation, Rules, Seen, Version, Writer};

/// A request as the disk has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Request {
    id: Version,
    /// When it was performed, and for a read, what it found.
    performed: bool,
    found: Option<Version>,
}

/// One run of the disk.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Disk {
    /// All contents since those on the medium.
    contents: Vec<Version>,
    requests: Vec<Request>,
    /// Acknowledged writes that were dropped with the cache.
    dropped: BTreeSet<Version>,
    /// Writes over which an earlier one came that had failed.
    spoiled: BTreeSet<Version>,
    /// Writes that a read has found.
    shown: BTreeSet<Version>,
}

/// What is told of a request, the same for all runs.
#[derive(Clone, Debug)]
struct Told {
    id: Version,
    writer: Writer,
    operation: Operation,
    submitted: usize,
    acknowledged: Option<usize>,
    failed: Option<usize>,
    void: bool,
    /// For a write: flushed; covered by a failed flush; when it was lost; who knows since.
    durable: bool,
    doubtful: bool,
    /// A flush that does not cover it may have come after it.
    may_be_durable: bool,
    /// Whether it was answered, or its ring is gone.
    over: bool,
    lost: Option<usize>,
    knows: BTreeSet<Writer>,
}

impl Told {
    fn writes(&self) -> bool {
        !matches!(self.operation, Operation::Read(_) | Operation::Flush)
    }

    fn is_data(&self) -> bool {
        matches!(self.operation, Operation::Write(_))
    }

    /// Whether its loss has to be told.
    fn is_promised(&self) -> bool {
        let is_hint = matches!(self.operation, Operation::Discard(_));
        self.writes() && !is_hint && self.acknowledged.is_some()
    }
}

#[derive(Clone)]
pub struct Model {
    rules: Rules,
    now: usize,
    failing: bool,
    told: Vec<Told>,
    runs: BTreeSet<Disk>,
}

impl Model {
    pub fn new(rules: Rules) -> Self {
        let disk = Disk {
            contents: vec![0],
            requests: Vec::new(),
            dropped: BTreeSet::new(),
            spoiled: BTreeSet::new(),
            shown: BTreeSet::new(),
        };
        Self { rules, now: 0, failing: false, told: Vec::new(), runs: [disk].into() }
    }

    fn of(&self, id: Version) -> &Told {
        self.told.iter().find(|told| told.id == id).unwrap()
    }

    fn told(&mut self, id: Version) -> &mut Told {
        self.told.iter_mut().find(|told| told.id == id).unwrap()
    }

    /// Whether some run of the disk does that.
    pub fn apply(&mut self, event: &Event) -> bool {
        self.now += 1;
        let now = self.now;
        match event {
            Event::Submitted { id, writer, operation } => {
                self.told.push(Told {
                    id: *id,
                    writer: *writer,
                    operation: *operation,
                    submitted: now,
                    acknowledged: None,
                    failed: None,
                    void: false,
                    durable: false,
                    doubtful: false,
                    may_be_durable: false,
                    over: false,
                    lost: None,
                    knows: BTreeSet::new(),
                });
                self.each(|disk| {
                    disk.requests.push(Request { id: *id, performed: false, found: None });
                });
                true
            }
            Event::Answered { id, answer } => {
                self.run();
                let good = self.answer(*id, answer);
                // The first answer after a kexec: what was void is over.
                let void: Vec<_> =
                    self.told.iter().filter(|told| told.void).map(|told| told.id).collect();
                self.each(|disk| disk.requests.retain(|request| !void.contains(&request.id)));
                good
            }
            Event::Died(death) => {
                self.run();
                self.die(*death);
                true
            }
            Event::Failing(failing) => {
                self.run();
                self.failing = *failing;
                true
            }
            Event::Reopened => {
                self.told.iter_mut().for_each(|told| told.lost = None);
                true
            }
            Event::Closed => {
                self.may_be_flushed();
                true
            }
        }
    }

    fn answer(&mut self, id: Version, answer: &Answer) -> bool {
        let now = self.now;
        self.told(id).over = true;
        let told = self.of(id).clone();
        match (told.operation, answer) {
            (Operation::Read(_), Answer::Read(seen)) => {
                let fits = |model: &Self, found: Version| match seen[0] {
                    Seen::Version(version) => found == version && model.of(version).is_data(),
                    Seen::Zeroes => found == 0 || !model.of(found).is_data(),
                    _ => false,
                };
                let copy = self.clone();
                self.runs.retain(|disk| {
                    let read = disk.requests.iter().find(|request| request.id == id);
                    read.unwrap().found.is_some_and(|found| fits(&copy, found))
                });
            }
            (Operation::Flush, Answer::Done) => return self.flushed(&told),
            (Operation::Flush, Answer::Failed) => {
                for write in &mut self.told {
                    let covered = write.acknowledged.is_some_and(|at| at < told.submitted);
                    if write.writes() && covered && !write.durable {
                        write.doubtful = true;
                        write.lost.get_or_insert(now);
                        write.knows.insert(told.writer);
                    }
                }
            }
            (_, Answer::Failed) if told.writes() => self.told(id).failed = Some(now),
            (_, Answer::Done) => {
                self.runs.retain(|disk| {
                    let write = disk.requests.iter().find(|request| request.id == id);
                    write.unwrap().performed && !disk.spoiled.contains(&id)
                });
                self.told(id).acknowledged = Some(now);
                if self.rules.write_through {
                    self.told(id).durable = true;
                    // It or a newer one is on the medium.
                    self.runs.retain(|disk| !disk.contents[1..].contains(&id));
                }
            }
            _ => {}
        }
        if told.operation == Operation::Flush || !told.writes() || *answer == Answer::Done {
            self.each(|disk| disk.requests.retain(|request| request.id != id));
        }
        !self.runs.is_empty()
    }

    fn flushed(&mut self, flush: &Told) -> bool {
        let covers = |write: &Told| {
            write.writes() && write.acknowledged.is_some_and(|at| at < flush.submitted)
        };
        let is_told = |write: &Told| match self.rules.flush_failure {
            FlushFailure::Sticky => false,
            FlushFailure::Once => {
                write.writer != flush.writer || write.knows.contains(&flush.writer)
            }
        };
        let is_lost = |write: &Told| write.lost.is_some_and(|at| at < flush.submitted);
        if self.told.iter().any(|write| covers(write) && is_lost(write) && !is_told(write)) {
            return false;
        }
        let promised = |write: &&Told| covers(write) && !write.doubtful;
        let safe: Vec<_> = self.told.iter().filter(promised).map(|write| write.id).collect();
        self.runs.retain(|disk| {
            // It was not dropped, and is on the medium, or something newer is.
            safe.iter().all(|id| !disk.dropped.contains(id) && !disk.contents[1..].contains(id))
        });
        self.told.iter_mut().filter(|it| safe.contains(&it.id)).for_each(|it| {
            (it.durable, it.lost) = (true, None);
        });
        self.may_be_flushed();
        !self.runs.is_empty()
    }

    fn may_be_flushed(&mut self) {
        self.told.iter_mut().for_each(|told| told.may_be_durable = true);
    }

    fn die(&mut self, death: Death) {
        let is_open = |told: &Told| told.operation == Operation::Flush && !told.over;
        if matches!(death, Death::Server { keeps_cache: false } | Death::GuestRing)
            && self.told.iter().any(is_open)
        {
            self.may_be_flushed();
        }
        if matches!(death, Death::GuestRing | Death::Host) {
            self.told.iter_mut().for_each(|told| told.over = true);
        }
        match death {
            Death::Daemon | Death::Server { keeps_cache: true } => {}
            Death::Server { keeps_cache: false } => {
                let (copy, now) = (self.clone(), self.now);
                let runs = std::mem::take(&mut self.runs);
                for disk in runs {
                    for left in 1..=disk.contents.len() {
                        let mut disk = disk.clone();
                        copy.drop_after(&mut disk, left);
                        self.runs.insert(disk);
                    }
                }
                for write in &mut self.told {
                    let is_over = write.durable || write.may_be_durable || write.doubtful;
                    if write.is_promised() && !is_over {
                        write.lost = Some(now);
                    }
                }
            }
            Death::GuestRing => {
                let now = self.now;
                let open = |told: &&mut Told| {
                    told.acknowledged.is_none() && told.failed.is_none() && told.writes()
                };
                for told in self.told.iter_mut().filter(open) {
                    (told.void, told.failed) = (true, Some(now));
                }
                let copy = self.clone();
                self.each(|disk| disk.requests.retain(|request| copy.of(request.id).writes()));
            }
            Death::Host => {
                self.each(|disk| {
                    disk.contents.truncate(1);
                    disk.requests.clear();
                    disk.dropped.clear();
                });
                for told in &mut self.told {
                    (told.durable, told.doubtful, told.lost) = (true, false, None);
                }
            }
            Death::Medium => unreachable!("the model is not told of it: anything goes then"),
        }
    }

    /// The newest contents go, down to `left` of them.
    fn drop_after(&self, disk: &mut Disk, left: usize) {
        for id in disk.contents.split_off(left) {
            if let Some(request) = disk.requests.iter_mut().find(|request| request.id == id) {
                request.performed = false;
            } else if self.of(id).is_promised() {
                disk.dropped.insert(id);
            }
        }
    }

    /// Adds everything that the disk can do by itself.
    fn run(&mut self) {
        let mut fresh: Vec<Disk> = self.runs.iter().cloned().collect();
        while let Some(disk) = fresh.pop() {
            for next in self.steps(&disk) {
                if self.runs.insert(next.clone()) {
                    fresh.push(next);
                }
            }
        }
    }

    fn steps(&self, disk: &Disk) -> Vec<Disk> {
        let mut steps = Vec::new();
        // The oldest of the contents is superseded on the medium.
        if disk.contents.len() > 1 {
            let mut next = disk.clone();
            next.contents.remove(0);
            steps.push(next);
        }
        // The cache is dropped: what is on the medium is read again.
        let can_go = |id: &Version| {
            let told = self.of(*id);
            told.doubtful || self.failing && !told.durable
        };
        if disk.contents.len() > 1 && disk.contents[1..].iter().all(can_go) {
            let mut next = disk.clone();
            self.drop_after(&mut next, 1);
            steps.push(next);
        }
        for (index, request) in disk.requests.iter().enumerate() {
            let told = self.of(request.id);
            if request.performed || told.operation == Operation::Flush {
                continue;
            }
            let mut next = disk.clone();
            next.requests[index].performed = true;
            if !told.writes() {
                next.requests[index].found = disk.contents.last().copied();
                next.shown.extend(disk.contents.last());
                steps.push(next);
                continue;
            }
            // One that has failed does not come over a later one that is acknowledged or was shown.
            let later = |other: &&Told| {
                other.writes()
                    && told.failed.is_some_and(|at| at < other.submitted)
                    && self.is_done(disk, other)
            };
            let later: Vec<_> = self.told.iter().filter(later).collect();
            let is_known =
                |other: &&Told| other.acknowledged.is_some() || disk.shown.contains(&other.id);
            if later.iter().copied().any(|other| is_known(&other)) {
                continue;
            }
            next.spoiled.extend(later.iter().map(|other| other.id));
            if matches!(told.operation, Operation::Discard(_)) {
                steps.push(next.clone());
            }
            next.contents.push(request.id);
            steps.push(next);
        }
        steps
    }

    fn is_done(&self, disk: &Disk, told: &Told) -> bool {
        let request = disk.requests.iter().find(|request| request.id == told.id);
        told.acknowledged.is_some() || request.is_some_and(|request| request.performed)
    }

    fn each(&mut self, change: impl Fn(&mut Disk)) {
        let runs = std::mem::take(&mut self.runs).into_iter();
        self.runs = runs
            .map(|mut disk| {
                change(&mut disk);
                disk
            })
            .collect();
    }
}
