//! Taking up a ring that another backend may have served.
//!
//! A backend answers in any order, and an answer takes the slot of a request. So the ring alone does
//! not tell a successor what was answered, nor does it tell whose ring it is: after a kexec a guest
//! may well publish the same grant references and the same event channel for a ring of its own. A
//! backend therefore leaves a *mark* on every ring that it serves, in the last word of the padding of
//! the ring's header (`xen/include/public/io/ring.h`; no end reads it, and making a ring clears it).
//!
//! | mark | the ring |
//! |---|---|
//! | 0 | no backend that leaves marks has served it |
//! | 1 | its backend has answered all that it took, and let go of it |
//! | 2 | its backend keeps no [journal] |
//! | other | its backend keeps the journal with that mark |
//!
//! The mark is on the ring before the first request is taken. A take-over is possible
//!
//! 1. with the journal of that ring (the same mark, domain, event channel, references, layout, and
//!    numbers that fit the ring's): what it says was not answered is done again;
//! 2. of a ring without unanswered requests;
//! 3. of a ring that was let go of, and of a new one (no mark and no response): its requests were
//!    not taken before.
//!
//! Everything else is refused ([`AttachError::Unanswered`]): a request could be done twice or never.
//!
//! What is not detected: a frontend that makes a new ring in the very pages of the old one, with the
//! same references and event channel, and does not clear the padding. It has the requests of its old
//! ring done again, if their number fits. A frontend can do that to itself in any case.

use alloc::boxed::Box;

use pvblk::backend::Violation;
use pvblk::memory::SharedRegion;
use pvblk::ring::{Overrun, SharedIndex};

use crate::journal::{self, Journal, JournalledRing, Lasting, RingName};
use crate::wire::{IndexAt, index};

/// The mark of a ring.
mod mark {
    pub const NONE: u32 = 0;
    pub const RELEASED: u32 = 1;
    pub const UNJOURNALLED: u32 = 2;
    /// The first one of a journal.
    pub const JOURNAL: u32 = 3;
}

/// How a backend begins to serve a ring.
#[derive(Default)]
pub struct Attachment<'a> {
    /// What the frontend published of the ring, and memory for a journal: at least
    /// [`bytes_for`](crate::journal::bytes_for) the ring's slots; with less the ring has none.
    pub journal: Option<(RingName<'a>, Box<dyn Lasting>)>,
    /// Whether an earlier backend may have served the ring.
    pub takeover: bool,
}

/// Why a ring cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The ring is in a state that no ring can be in.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// An earlier backend has served the ring and may have answered requests without saying which.
    #[error(
        "an earlier backend left up to {0} requests unanswered, and there is no journal of this ring \
         that says which: the guest must connect again (detach and attach the disk, or restart the \
         guest)"
    )]
    Unanswered(u32),
}

/// Where work on a ring begins.
pub(crate) struct Start {
    pub journal: Option<Journal>,
    /// The next request to take.
    pub request: u32,
    /// The next response to write.
    pub response: u32,
}

/// Decides where work begins, and marks the ring. `header` is its first page.
pub(crate) fn start(
    header: SharedRegion<'_>,
    slots: u32,
    stride: usize,
    attachment: Attachment<'_>,
) -> Result<Start, AttachError> {
    let Attachment { journal: mut kept, takeover } = attachment;
    let [produced, shown, found] = [index::REQ_PROD, index::RSP_PROD, index::MARK]
        .map(|offset| IndexAt(header, offset).load());
    let left = produced.wrapping_sub(shown);
    if left > slots {
        return Err(AttachError::Violation(Overrun.into()));
    }
    if takeover {
        if found >= mark::JOURNAL
            && let Some((name, memory)) = kept.take()
        {
            let ring = JournalledRing { name, slots, stride, mark: found };
            match Journal::resume(memory, &ring, shown, produced) {
                Ok((journal, request)) => {
                    return Ok(Start { journal: Some(journal), request, response: shown });
                }
                Err(other) => kept = Some((name, other)),
            }
        }
        let is_untaken = found == mark::RELEASED || (found, shown) == (mark::NONE, 0);
        if left > 0 && !is_untaken {
            return Err(AttachError::Unanswered(left));
        }
    }
    let (journal, mark) = match kept.and_then(|(name, memory)| {
        // No earlier ring has that mark: neither this one nor the one that the journal was of.
        let mark = next_mark([found, journal::mark_in(&*memory)]);
        let ring = JournalledRing { name, slots, stride, mark };
        Some((Journal::begin(memory, &ring, shown)?, mark))
    }) {
        Some((journal, mark)) => (Some(journal), mark),
        None => (None, mark::UNJOURNALLED),
    };
    // The journal is complete: a successor may rely on it from now on.
    IndexAt(header, index::MARK).store(mark);
    Ok(Start { journal, request: shown, response: shown })
}

/// Lets go of a ring on which every request that was taken is answered.
pub(crate) fn release(header: SharedRegion<'_>) {
    IndexAt(header, index::MARK).store(mark::RELEASED);
}

/// The mark of a new journal. `before` may be anything: one of them is the guest's.
fn next_mark(before: [u32; 2]) -> u32 {
    let last = before.into_iter().max().unwrap_or_default();
    let first = last.saturating_add(1).max(mark::JOURNAL);
    // Of three marks that are near to each other, one is neither of the two.
    let free = |mark: &u32| !before.contains(mark);
    [first, mark::JOURNAL, mark::JOURNAL + 1].into_iter().find(free).unwrap_or(first)
}

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;
    use alloc::vec::Vec;
    use core::ptr::NonNull;
    use core::sync::atomic::AtomicU64;

    use super::*;
    use crate::journal::bytes_for;
    use crate::platform::{DomainId, GrantRef, Port};

    const SLOTS: u32 = 32;
    const STRIDE: usize = 112;
    const NAME: RingName<'static> =
        RingName { peer: DomainId(5), port: Port(3), references: &[GrantRef(8)] };

    /// Clones are the same memory.
    #[derive(Clone)]
    struct Memory(Arc<[AtomicU64]>);

    impl Memory {
        fn new(bytes: usize) -> Self {
            Self((0..bytes / 8).map(|_| AtomicU64::new(0)).collect())
        }
    }

    impl Lasting for Memory {
        fn region(&self) -> SharedRegion<'_> {
            // SAFETY: it may be written to through a shared reference, and lives as long as this one.
            unsafe { SharedRegion::new(NonNull::from(&*self.0).cast(), self.0.len() * 8) }
        }
    }

    /// The header of a ring with so many requests and responses.
    fn ring(produced: u32, shown: u32, mark: u32) -> Memory {
        let ring = Memory::new(64);
        for (offset, value) in
            [(index::REQ_PROD, produced), (index::RSP_PROD, shown), (index::MARK, mark)]
        {
            IndexAt(ring.region(), offset).store(value);
        }
        ring
    }

    fn mark_of(ring: &Memory) -> u32 {
        IndexAt(ring.region(), index::MARK).load()
    }

    fn journal() -> Memory {
        Memory::new(bytes_for(SLOTS as usize))
    }

    fn start_named(
        ring: &Memory,
        name: RingName<'_>,
        journal: Option<&Memory>,
        takeover: bool,
    ) -> Result<Start, AttachError> {
        let journal = journal.map(|memory| (name, Box::new(memory.clone()) as Box<dyn Lasting>));
        start(ring.region(), SLOTS, STRIDE, Attachment { journal, takeover })
    }

    fn begin(
        ring: &Memory,
        journal: Option<&Memory>,
        takeover: bool,
    ) -> Result<Start, AttachError> {
        start_named(ring, NAME, journal, takeover)
    }

    /// Takes the next request of the ring, as a backend does.
    fn take(start: &mut Start) {
        let journal = start.journal.as_mut().unwrap();
        let entry = journal.vacancy().unwrap();
        journal.memory().taken(entry, start.request);
        start.request += 1;
    }

    fn again(mut start: Start) -> usize {
        let journal = start.journal.as_mut().unwrap();
        core::iter::from_fn(|| journal.again()).count()
    }

    #[test]
    fn a_ring_that_may_have_unanswered_requests_is_not_guessed_at() {
        let with_none: [(u32, u32, u32, Result<u32, u32>); 10] = [
            // Made, answered and marked: where to begin, or how many are unanswered.
            (0, 0, mark::NONE, Ok(0)),
            (4, 0, mark::NONE, Ok(0)),
            (4, 1, mark::NONE, Err(3)),
            (4, 4, mark::NONE, Ok(4)),
            (4, 1, mark::RELEASED, Ok(1)),
            (4, 0, mark::UNJOURNALLED, Err(4)),
            (4, 3, mark::UNJOURNALLED, Err(1)),
            (4, 4, mark::UNJOURNALLED, Ok(4)),
            (4, 3, mark::JOURNAL, Err(1)),
            (4, 4, u32::MAX, Ok(4)),
        ];
        for (produced, shown, found, expected) in with_none {
            for kept in [None, Some(journal())] {
                let there = ring(produced, shown, found);
                match (begin(&there, kept.as_ref(), true), expected) {
                    (Ok(start), Ok(at)) => {
                        assert_eq!((start.request, start.response), (at, at));
                        assert_eq!(start.journal.is_some(), kept.is_some());
                        let marked = mark_of(&there);
                        let journalled = marked >= mark::JOURNAL && marked != found;
                        assert!(if kept.is_some() { journalled } else { marked == 2 });
                    }
                    (Err(AttachError::Unanswered(count)), Err(expected)) => {
                        assert_eq!(count, expected);
                        assert_eq!(mark_of(&there), found, "the ring is left as it is");
                    }
                    (result, _) => panic!("{produced} {shown} {found}: {:?}", result.err()),
                }
                // A frontend that has just connected is served from where responses end.
                let there = ring(produced, shown, found);
                let start = begin(&there, kept.as_ref(), false).unwrap();
                assert_eq!((start.request, start.response), (shown, shown));
            }
        }
        let too_many = begin(&ring(33, 0, 0), None, false).err();
        assert!(matches!(too_many, Some(AttachError::Violation(_))), "{too_many:?}");
    }

    /// Three requests are taken; then another kernel has made its ring in the same place, with the
    /// same references and the same event channel.
    #[test]
    fn requests_of_an_old_ring_are_not_done_on_a_new_one() {
        let kept = journal();
        let old = ring(3, 0, 0);
        let mut first = begin(&old, Some(&kept), false).unwrap();
        (0..3).for_each(|_| take(&mut first));
        assert_eq!(again(begin(&old, Some(&kept), true).unwrap()), 3, "it is that ring");
        for produced in [0, 3, 5] {
            let kept = copy(&kept);
            let new = ring(produced, 0, 0);
            let start = begin(&new, Some(&kept), true).unwrap();
            assert_eq!(start.request, 0);
            assert_eq!(again(start), 0);
            assert!(mark_of(&new) != mark_of(&old), "a mark of its own");
        }
        // The mark alone is not enough either.
        let name = RingName { references: &[GrantRef(9)], ..NAME };
        let kept = Some(copy(&kept));
        assert_eq!(
            start_named(&old, name, kept.as_ref(), true).err(),
            Some(AttachError::Unanswered(3))
        );
    }

    fn copy(memory: &Memory) -> Memory {
        let there = Memory::new(memory.region().len());
        let mut bytes = alloc::vec![0; memory.region().len()];
        memory.region().read_bytes(0, &mut bytes);
        there.region().write_bytes(0, &bytes);
        there
    }

    #[test]
    fn no_two_rings_have_the_same_mark() {
        let kept = journal();
        let marks: Vec<_> = (0..5)
            .map(|_| {
                let ring = ring(0, 0, 0);
                drop(begin(&ring, Some(&kept), false).unwrap());
                mark_of(&ring)
            })
            .collect();
        assert!(marks.is_sorted_by(|a, b| a < b) && marks[0] == mark::JOURNAL, "{marks:?}");
        let odd = [0, 1, 2, 3, 4, 5, u32::MAX - 1, u32::MAX];
        for pair in odd.iter().flat_map(|one| odd.map(|other| [*one, other])) {
            let next = next_mark(pair);
            assert!(next >= mark::JOURNAL && !pair.contains(&next), "{pair:?}: {next}");
        }
    }

    #[test]
    fn what_is_let_go_of_needs_no_journal() {
        let there = ring(9, 4, mark::UNJOURNALLED);
        release(there.region());
        assert_eq!(begin(&there, None, true).unwrap().request, 4);
        // Whoever serves it now has not let go of it.
        assert_eq!(begin(&there, None, true).err(), Some(AttachError::Unanswered(5)));
    }
}
