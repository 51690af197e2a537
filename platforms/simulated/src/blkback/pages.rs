//! Reaching the frontend's data pages, and noticing when they are used badly.

use std::collections::BTreeMap;

use pvblk::memory::Access;
use pvblk_xen::platform::{DomainId, GrantRef};

use super::config::{DataPath, Hostility};
use super::layout::Segment;
use super::ring::Queue;
use super::{Core, MapError};
use crate::{Domain, Mapping};

/// A page that stays mapped.
pub(super) struct Persistent {
    pub(super) mapping: Mapping,
    pub(super) in_use: u32,
    pub(super) last_use: u64,
}

/// How one page of a request is reached while the request is outstanding.
pub(super) enum Reach {
    Mapped(Mapping),
    Persistent,
    Copied,
}

/// A page of a request, with what was used of it.
pub(super) struct Part {
    pub(super) segment: Segment,
    pub(super) frame: usize,
    pub(super) reach: Reach,
}

impl Part {
    pub(super) fn offset(&self) -> usize {
        usize::from(self.segment.first) * 512
    }

    pub(super) fn length(&self) -> usize {
        (usize::from(self.segment.last) - usize::from(self.segment.first) + 1) * 512
    }
}

/// Who uses which sectors of which frame.
#[derive(Default)]
pub(super) struct Uses(BTreeMap<usize, Vec<(Segment, bool)>>);

impl Uses {
    /// Records a use; says whether it conflicts with another one. `written` is whether the
    /// backend writes to the page.
    pub(super) fn add(&mut self, frame: usize, segment: Segment, written: bool) -> bool {
        let uses = self.0.entry(frame).or_default();
        let conflict = uses.iter().any(|(other, other_written)| {
            (written || *other_written)
                && segment.first <= other.last
                && other.first <= segment.last
        });
        uses.push((segment, written));
        conflict
    }

    pub(super) fn remove(&mut self, frame: usize, segment: Segment, written: bool) {
        let Some(uses) = self.0.get_mut(&frame) else { return };
        if let Some(index) = uses.iter().position(|entry| *entry == (segment, written)) {
            uses.swap_remove(index);
        }
        if uses.is_empty() {
            self.0.remove(&frame);
        }
    }
}

impl Core {
    /// Reaches a page for a request. `written`: the backend will write to it.
    pub(super) fn reach(
        &mut self,
        queue: &mut Queue,
        segment: Segment,
        written: bool,
    ) -> Result<Part, MapError> {
        let reference = GrantRef(segment.reference);
        let frame = self.domain.frame_of(self.frontend, reference)?;
        if self.persistent {
            return self.reach_persistent(queue, segment, frame);
        }
        if !written && !self.domain.is_read_only_grant(self.frontend, reference) {
            self.statistics.writable_grants_only_read += 1;
            if self.config.demand_read_only_grants {
                self.violation(format!("{reference:?} is only read, but granted for writing"));
            }
        }
        let access = if written { Access::ReadWrite } else { Access::Read };
        let reach = match self.config.data_path {
            DataPath::Map => {
                Reach::Mapped(self.domain.map_page(self.frontend, reference, access)?)
            }
            DataPath::Snapshot => {
                Reach::Mapped(self.domain.map_snapshot(self.frontend, reference, access)?)
            }
            DataPath::Copy => {
                if written && self.domain.is_read_only_grant(self.frontend, reference) {
                    return Err(MapError::ReadOnly);
                }
                Reach::Copied
            }
        };
        Ok(Part { segment, frame, reach })
    }

    fn reach_persistent(
        &mut self,
        queue: &mut Queue,
        segment: Segment,
        frame: usize,
    ) -> Result<Part, MapError> {
        let reference = segment.reference;
        self.uses_counter += 1;
        let now = self.uses_counter;
        if let Some(kept) = queue.persistent.get_mut(&reference) {
            if kept.mapping.frame() != frame {
                // The table forbids it as long as the mapping lives.
                self.violation(format!("grant {reference} names another page than it did"));
                return Err(MapError::BadReference);
            }
            kept.in_use += 1;
            kept.last_use = now;
            self.statistics.persistent_hits += 1;
            return Ok(Part { segment, frame, reach: Reach::Persistent });
        }
        // A persistent page may be used in both directions later, so it has to be writable.
        let mapping =
            self.domain.map_page(self.frontend, GrantRef(reference), Access::ReadWrite)?;
        if queue.persistent.len() >= self.config.persistent_limit {
            let unused = queue.persistent.iter().filter(|(_, kept)| kept.in_use == 0);
            let oldest = unused.min_by_key(|(_, kept)| kept.last_use).map(|(key, _)| *key);
            match oldest {
                Some(oldest) => {
                    let kept = queue.persistent.remove(&oldest);
                    self.unmap(kept.map(|kept| kept.mapping));
                }
                None => {
                    return Ok(Part { segment, frame, reach: Reach::Mapped(mapping) });
                }
            }
        }
        queue.persistent.insert(reference, Persistent { mapping, in_use: 1, last_use: now });
        let kept = queue.persistent.len();
        self.statistics.most_persistent = self.statistics.most_persistent.max(kept);
        Ok(Part { segment, frame, reach: Reach::Persistent })
    }

    /// Ends what `reach` began.
    pub(super) fn release(&mut self, queue: &mut Queue, part: Part) {
        match part.reach {
            Reach::Mapped(mapping) => self.unmap(Some(mapping)),
            Reach::Persistent => {
                if let Some(kept) = queue.persistent.get_mut(&part.segment.reference) {
                    kept.in_use = kept.in_use.saturating_sub(1);
                }
            }
            Reach::Copied => {}
        }
    }

    pub(super) fn unmap(&mut self, mapping: Option<Mapping>) {
        let keep = self.config.is_hostile(Hostility::KeepGrants);
        if let Some(mapping) = mapping
            && keep
            && self.random.one_in(self.config.hostile_one_in)
        {
            mapping.leak();
        }
    }
}

/// Reads the bytes of a part.
pub(super) fn read_part(
    domain: &Domain,
    frontend: DomainId,
    kept: &mut BTreeMap<u32, Persistent>,
    part: &mut Part,
    bytes: &mut [u8],
) -> Result<(), MapError> {
    let (offset, reference) = (part.offset(), part.segment.reference);
    match &mut part.reach {
        Reach::Mapped(mapping) => mapping.read_bytes(offset, bytes),
        Reach::Persistent => match kept.get_mut(&reference) {
            Some(kept) => kept.mapping.read_bytes(offset, bytes),
            None => return Err(MapError::BadReference),
        },
        Reach::Copied => domain.copy_from(frontend, GrantRef(reference), offset, bytes)?,
    }
    Ok(())
}

/// Writes the bytes of a part.
pub(super) fn write_part(
    domain: &Domain,
    frontend: DomainId,
    kept: &mut BTreeMap<u32, Persistent>,
    part: &mut Part,
    bytes: &[u8],
) -> Result<(), MapError> {
    let (offset, reference) = (part.offset(), part.segment.reference);
    match &mut part.reach {
        Reach::Mapped(mapping) => mapping.write_bytes(offset, bytes),
        Reach::Persistent => match kept.get_mut(&reference) {
            Some(kept) => kept.mapping.write_bytes(offset, bytes),
            None => return Err(MapError::BadReference),
        },
        Reach::Copied => domain.copy_to(frontend, GrantRef(reference), offset, bytes)?,
    }
    Ok(())
}
