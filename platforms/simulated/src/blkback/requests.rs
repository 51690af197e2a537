//! Requests: taken from the ring, checked, carried out, answered once.

use super::config::{CloseAt, Completion, Hostility};
use super::layout::{
    BARRIER, DIRECT_SEGMENTS, DISCARD, ERROR, FLUSH, INDIRECT, INDIRECT_PAGES, NOT_SUPPORTED, OKAY,
    READ, SEGMENTS_PER_PAGE, Segment, WRITE, number16, number32, number64,
};
use super::pages::{Part, read_part, write_part};
use super::ring::Queue;
use super::{Core, Feature};
use crate::faults::Random;
use pvblk_xen::platform::EventChannels;

/// A request that was taken and not answered.
pub(super) struct Pending {
    /// Its index in the ring.
    pub(super) index: u32,
    pub(super) id: u64,
    /// What the answer names.
    operation: u8,
    work: Work,
    parts: Vec<Part>,
    tables: Vec<Part>,
    ready_at: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Fail(i16),
    Read {
        sector: u64,
    },
    /// Data if there is any, and then a flush if `durable`.
    Write {
        sector: u64,
        durable: bool,
        barrier: bool,
    },
    Discard {
        sector: u64,
        sectors: u64,
    },
}

impl Work {
    fn writes_memory(self) -> bool {
        matches!(self, Self::Read { .. })
    }

    fn is_barrier(self) -> bool {
        matches!(self, Self::Write { barrier: true, .. })
    }
}

impl Core {
    /// Does a little of one queue's work. Says whether it did any.
    pub(super) fn step_queue(&mut self, queue: &mut Queue) -> bool {
        if queue.dead {
            return false;
        }
        let event = self.domain.take(queue.port);
        if event {
            self.statistics.events_received += 1;
            let first = std::mem::take(&mut queue.first_event);
            if !first && !queue.awake && queue.request_producer() == queue.requests_consumed {
                self.statistics.needless_events += 1;
            }
            queue.awake = true;
        }
        let mut progress = event;
        if queue.awake {
            progress |= self.take_requests(queue);
        }
        progress |= self.answer_some(queue);
        progress | self.harass_ring(queue)
    }

    fn take_requests(&mut self, queue: &mut Queue) -> bool {
        let mut taken = 0;
        while taken < self.config.requests_a_step {
            let producer = queue.request_producer();
            if producer.wrapping_sub(queue.responses_produced) > queue.size {
                self.violation(format!(
                    "request producer {producer} is more than a ring ahead of {}",
                    queue.responses_produced
                ));
                queue.dead = true;
                return true;
            }
            let busy = queue.requests_consumed.wrapping_sub(queue.responses_produced);
            if producer == queue.requests_consumed || busy >= queue.size {
                break;
            }
            let index = queue.requests_consumed;
            let slot = queue.take_slot();
            self.take_request(queue, index, &slot);
            taken += 1;
            self.statistics.requests += 1;
            if self.config.close_at == Some(CloseAt::Requests(self.statistics.requests)) {
                self.close_soon = true;
            }
        }
        let outstanding = queue.pending.len();
        self.statistics.most_outstanding = self.statistics.most_outstanding.max(outstanding);
        if queue.request_producer() != queue.requests_consumed {
            return taken != 0;
        }
        if self.config.hold_off_while_busy && !queue.pending.is_empty() {
            // Awake, but only the answers can bring news.
            return taken != 0;
        }
        if !queue.arm() {
            queue.awake = false;
            self.domain.unmask(queue.port);
        }
        true
    }

    fn take_request(&mut self, queue: &mut Queue, index: u32, slot: &[u8; 112]) {
        let abi = queue.abi;
        let id = number64(slot, abi.id());
        if queue.pending.iter().any(|pending| pending.id == id) {
            self.violation(format!("id {id:#x} is used by two outstanding requests"));
        }
        let (low, high) = self.config.latency;
        let wait = low + self.random.below(high.saturating_sub(low).saturating_add(1));
        let ready_at = if high == 0 { 0 } else { self.host.now() + wait };
        let mut pending = Pending {
            index,
            id,
            operation: slot[0],
            work: Work::Fail(ERROR),
            parts: Vec::new(),
            tables: Vec::new(),
            ready_at,
        };
        if let Err(status) = self.decode(queue, slot, &mut pending) {
            pending.work = Work::Fail(status);
        }
        queue.pending.push(pending);
    }

    fn decode(
        &mut self,
        queue: &mut Queue,
        slot: &[u8; 112],
        pending: &mut Pending,
    ) -> Result<(), i16> {
        let abi = queue.abi;
        let sector = number64(slot, abi.sector());
        match slot[0] {
            READ | WRITE | BARRIER | FLUSH => {
                self.check_handle(number16(slot, 2));
                let count = usize::from(slot[1]);
                let may_be_empty = matches!(slot[0], BARRIER | FLUSH);
                if count > DIRECT_SEGMENTS || (count == 0 && !may_be_empty) {
                    return self.refuse(format!("operation {} with {count} segments", slot[0]));
                }
                let entries = &slot[abi.segments()..abi.segments() + count * 8];
                let segments = entries.chunks(8).map(Segment::from_bytes).collect();
                match slot[0] {
                    READ => self.statistics.reads += 1,
                    WRITE => self.statistics.writes += 1,
                    BARRIER => {
                        self.check_feature(Feature::Barrier)?;
                        self.statistics.barriers += 1;
                    }
                    _ => {
                        self.check_feature(Feature::Flush)?;
                        self.statistics.flushes += 1;
                    }
                }
                self.transfer(queue, pending, slot[0], sector, segments)
            }
            INDIRECT => {
                self.check_handle(number16(slot, abi.indirect_handle()));
                self.statistics.indirect_requests += 1;
                let (inner, count) = (slot[1], usize::from(number16(slot, 2)));
                if self.config.echo_inner_operation {
                    pending.operation = inner;
                }
                if self.revoked.contains(&Feature::Indirect) {
                    return Err(NOT_SUPPORTED);
                }
                match inner {
                    READ => self.statistics.reads += 1,
                    WRITE => self.statistics.writes += 1,
                    _ => return self.refuse(format!("operation {inner} by indirection")),
                }
                let limit = self.config.max_indirect_segments.unwrap_or(0) as usize;
                let limit = limit.min(INDIRECT_PAGES * SEGMENTS_PER_PAGE);
                if count == 0 || count > limit {
                    return self.refuse(format!("{count} indirect segments, the limit is {limit}"));
                }
                let at = abi.indirect_references();
                let references = slot[at..at + INDIRECT_PAGES * 4].chunks(4);
                let references: Vec<_> = references.map(|bytes| number32(bytes, 0)).collect();
                let segments = self.read_tables(queue, pending, &references, count)?;
                self.transfer(queue, pending, inner, sector, segments)
            }
            DISCARD => {
                self.check_feature(Feature::Discard)?;
                self.statistics.discards += 1;
                let sectors = number64(slot, abi.discard_sectors());
                let secure = slot[1] & 1 != 0;
                if slot[1] & !1 != 0 {
                    return self.refuse(format!("unknown discard flags {:#x}", slot[1]));
                }
                if secure {
                    if !self.config.discard_secure {
                        self.violation("a secure discard, which is not offered".into());
                    }
                    self.statistics.secure_discards += 1;
                }
                self.check_extent(sector, sectors)?;
                self.check_writable()?;
                let granule = u64::from(self.config.discard_granularity.max(512)) / 512;
                let shift = u64::from(self.config.discard_alignment) / 512;
                if sectors == 0 || sector % granule != shift % granule {
                    return self.refuse(format!(
                        "a discard of {sectors} sectors at {sector}, the granularity is {granule}"
                    ));
                }
                pending.work = Work::Discard { sector, sectors };
                Ok(())
            }
            operation => {
                self.violation(format!("unknown operation {operation}"));
                Err(NOT_SUPPORTED)
            }
        }
    }

    /// The segments of an indirect request. Each table is read once.
    fn read_tables(
        &mut self,
        queue: &mut Queue,
        pending: &mut Pending,
        references: &[u32],
        count: usize,
    ) -> Result<Vec<Segment>, i16> {
        let mut segments = Vec::new();
        for (index, reference) in references.iter().enumerate() {
            let entries = count.saturating_sub(index * SEGMENTS_PER_PAGE).min(SEGMENTS_PER_PAGE);
            if entries == 0 {
                break;
            }
            let last = (entries * 8 - 1) / 512;
            let segment = Segment { reference: *reference, first: 0, last: last as u8 };
            let mut part = match self.reach(queue, segment, false) {
                Ok(part) => part,
                Err(error) => return self.refuse_all(format!("indirect page {index}: {error}")),
            };
            if !self.tables.insert(part.frame) {
                self.violation("an indirect page of two outstanding requests".into());
            }
            let mut bytes = vec![0; part.length()];
            let (domain, kept) = (&self.domain, &mut queue.persistent);
            let result = read_part(domain, self.frontend, kept, &mut part, &mut bytes);
            pending.tables.push(part);
            if let Err(error) = result {
                return self.refuse_all(format!("indirect page {index}: {error}"));
            }
            segments.extend(bytes[..entries * 8].chunks(8).map(Segment::from_bytes));
        }
        Ok(segments)
    }

    fn transfer(
        &mut self,
        queue: &mut Queue,
        pending: &mut Pending,
        operation: u8,
        sector: u64,
        segments: Vec<Segment>,
    ) -> Result<(), i16> {
        let work = match operation {
            READ => Work::Read { sector },
            WRITE => Work::Write { sector, durable: false, barrier: false },
            BARRIER => Work::Write { sector, durable: true, barrier: true },
            _ => Work::Write { sector, durable: true, barrier: false },
        };
        let logical = self.config.sector_size.max(512) / 512;
        let mut sectors = 0;
        for segment in &segments {
            let (first, last) = (u32::from(segment.first), u32::from(segment.last));
            if first > last || last > 7 {
                return self.refuse(format!("a segment of sectors {first}..={last}"));
            }
            if first % logical != 0 || (last + 1) % logical != 0 {
                return self.refuse(format!(
                    "a segment of sectors {first}..={last}, logical sectors have {logical}"
                ));
            }
            sectors += u64::from(last - first + 1);
        }
        if !segments.is_empty() {
            self.check_extent(sector, sectors)?;
        }
        if operation != READ && (operation == WRITE || !segments.is_empty()) {
            self.check_writable()?;
        }
        self.statistics.segments += segments.len() as u64;
        self.statistics.most_segments = self.statistics.most_segments.max(segments.len());
        for segment in segments {
            match self.reach(queue, segment, work.writes_memory()) {
                Ok(part) => {
                    if self.uses.add(part.frame, segment, work.writes_memory()) {
                        self.violation(format!(
                            "{segment:?} is part of another outstanding request as well"
                        ));
                    }
                    pending.parts.push(part);
                }
                Err(error) => {
                    // What was reached so far is let go with the answer.
                    pending.work = work;
                    self.forget_uses(pending);
                    return self.refuse(format!("{segment:?}: {error}"));
                }
            }
        }
        pending.work = work;
        Ok(())
    }

    fn check_handle(&mut self, handle: u16) {
        if self.config.check_handle && handle != self.vdev as u16 {
            self.violation(format!("handle {handle} of device {}", self.vdev));
        }
    }

    fn check_feature(&mut self, feature: Feature) -> Result<(), i16> {
        if self.revoked.contains(&feature) {
            return Err(NOT_SUPPORTED);
        }
        if !self.offers(feature) {
            self.violation(format!("{feature:?} is used, but not offered"));
            return Err(NOT_SUPPORTED);
        }
        Ok(())
    }

    fn check_writable(&mut self) -> Result<(), i16> {
        if self.config.read_only {
            return self.refuse("a change of a read-only disk".into());
        }
        Ok(())
    }

    fn check_extent(&mut self, sector: u64, sectors: u64) -> Result<(), i16> {
        let logical = u64::from(self.config.sector_size.max(512)) / 512;
        if !sector.is_multiple_of(logical) || !sectors.is_multiple_of(logical) {
            return self.refuse(format!("{sectors} sectors at {sector} are not aligned"));
        }
        match sector.checked_add(sectors) {
            Some(end) if end <= self.config.sectors => Ok(()),
            // The disk was larger once: the frontend may not have heard yet.
            Some(end) if end <= self.most_sectors => Err(ERROR),
            _ => self.refuse(format!("{sectors} sectors at {sector} are beyond the end")),
        }
    }

    fn refuse(&mut self, why: String) -> Result<(), i16> {
        self.violation(why);
        Err(ERROR)
    }

    fn refuse_all(&mut self, why: String) -> Result<Vec<Segment>, i16> {
        self.violation(why);
        Err(ERROR)
    }

    fn forget_uses(&mut self, pending: &Pending) {
        for part in &pending.parts {
            self.uses.remove(part.frame, part.segment, pending.work.writes_memory());
        }
    }

    /// Lets the pages of a request go.
    pub(super) fn let_go(&mut self, queue: &mut Queue, mut pending: Pending) {
        self.forget_uses(&pending);
        for part in &pending.tables {
            self.tables.remove(&part.frame);
        }
        for part in pending.parts.drain(..).chain(pending.tables.drain(..)) {
            self.release(queue, part);
        }
    }

    fn answer_some(&mut self, queue: &mut Queue) -> bool {
        if queue.pending.is_empty() || self.paused {
            return false;
        }
        let now = self.host.now();
        let mut answered = 0;
        while answered < self.config.answers_a_step {
            let Some(index) = self.choose(&queue.pending, now) else { break };
            let pending = queue.pending.remove(index);
            self.finish(queue, pending);
            answered += 1;
            if self.config.completion == Completion::Random && self.random.one_in(3) {
                break;
            }
        }
        if answered == 0 {
            // Some may be ready, and have to wait for one that is not.
            let times = queue.pending.iter().map(|pending| pending.ready_at);
            if let Some(next) = times.filter(|time| *time > now).min() {
                self.host.set_timer(next);
            }
            return false;
        }
        self.publish(queue);
        true
    }

    /// Which request is answered next.
    fn choose(&mut self, pending: &[Pending], now: u64) -> Option<usize> {
        // A barrier waits for all before it, and holds up all behind it.
        let end = match pending.iter().position(|pending| pending.work.is_barrier()) {
            Some(0) => 1,
            Some(barrier) => barrier,
            None => pending.len(),
        };
        match self.config.completion {
            Completion::InOrder => (pending.first()?.ready_at <= now).then_some(0),
            Completion::Random => {
                let ready: Vec<_> =
                    (0..end).filter(|index| pending[*index].ready_at <= now).collect();
                (!ready.is_empty()).then(|| ready[self.random.index(ready.len())])
            }
        }
    }

    /// Carries a request out, and puts its answer into the ring.
    pub(super) fn finish(&mut self, queue: &mut Queue, mut pending: Pending) {
        let status = self.carry_out(queue, &mut pending);
        match status {
            OKAY => {}
            NOT_SUPPORTED => self.statistics.answered_not_supported += 1,
            _ => self.statistics.answered_with_errors += 1,
        }
        let (id, operation) = (pending.id, pending.operation);
        // The pages go before the answer: afterwards the frontend may reuse them.
        self.let_go(queue, pending);
        self.answer(queue, id, operation, status);
    }

    /// Carries a request out without answering it.
    pub(super) fn carry_out(&mut self, queue: &mut Queue, pending: &mut Pending) -> i16 {
        let (domain, kept) = (&self.domain, &mut queue.persistent);
        match pending.work {
            Work::Fail(status) => return status,
            Work::Read { mut sector } => {
                let mut buffer = [0; 4096];
                for part in &mut pending.parts {
                    let bytes = &mut buffer[..part.length()];
                    if !self.disk.read(sector, bytes)
                        || write_part(domain, self.frontend, kept, part, bytes).is_err()
                    {
                        return ERROR;
                    }
                    sector += bytes.len() as u64 / 512;
                    self.statistics.bytes_read += bytes.len() as u64;
                }
            }
            Work::Write { mut sector, durable, .. } => {
                let mut buffer = [0; 4096];
                for part in &mut pending.parts {
                    let bytes = &mut buffer[..part.length()];
                    if read_part(domain, self.frontend, kept, part, bytes).is_err()
                        || !self.disk.write(sector, bytes)
                    {
                        return ERROR;
                    }
                    sector += bytes.len() as u64 / 512;
                    self.statistics.bytes_written += bytes.len() as u64;
                }
                if durable {
                    self.disk.flush();
                }
            }
            Work::Discard { sector, sectors } => {
                if sector + sectors > self.config.sectors {
                    return ERROR;
                }
                for sector in sector..sector + sectors {
                    self.disk.write(sector, &[0; 512]);
                }
                self.statistics.sectors_discarded += sectors;
            }
        }
        OKAY
    }

    fn answer(&mut self, queue: &mut Queue, id: u64, operation: u8, status: i16) {
        let (mut id, mut operation, mut status) = (id, operation, status);
        let true_id = id;
        let mut twice = false;
        if let Some(hostility) = self.choose_hostility() {
            match hostility {
                Hostility::WrongId => id ^= 1 + self.random.below(u64::MAX),
                Hostility::IdTwice => twice = true,
                Hostility::OldId if !queue.old_ids.is_empty() => {
                    id = queue.old_ids[self.random.index(queue.old_ids.len())];
                }
                Hostility::WrongOperation => operation = operation.wrapping_add(1),
                Hostility::WeirdStatus => status = self.random.number() as i16,
                Hostility::Silence => return,
                Hostility::ResponseToNothing => {
                    let nothing = self.random.number();
                    self.put(queue, nothing, operation, OKAY);
                }
                _ => {}
            }
        }
        self.put(queue, id, operation, status);
        if twice {
            self.put(queue, id, operation, status);
        }
        if queue.old_ids.len() < 4096 && !self.config.hostile.is_empty() {
            queue.old_ids.push(true_id);
        }
    }

    fn put(&mut self, queue: &mut Queue, id: u64, operation: u8, status: i16) {
        let scribble: Option<&mut Random> = self.config.scribble_slots.then_some(&mut self.random);
        queue.put_response(id, operation, status, scribble);
        self.statistics.answers += 1;
    }

    pub(super) fn publish(&mut self, queue: &mut Queue) {
        if queue.publish() {
            self.statistics.events_sent += 1;
            self.domain.notify(queue.port);
        }
        self.statistics.batches += 1;
    }
}
