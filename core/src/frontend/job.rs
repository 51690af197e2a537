//! A job: a user's request, unsplit, and the parts of it that are on the wire.

use super::request::{IoError, SubmitError};
use crate::buffer::{Cursor, Payload};
use crate::command::{Code, Features, Status};
use crate::extent::{Extent, ExtentError, Geometry, SECTOR_BYTES};
use crate::indirect::Chain;
use crate::memory::Access;
use crate::plan::{Limits, RangeLimits};
use crate::table::Tag;

impl Features {
    /// A part of `job` was not done. If the peer does not do such requests, takes the feature back;
    /// says what that means for the job.
    #[cold]
    pub(super) fn after<P>(
        &mut self,
        status: Status,
        job: &mut Job<P>,
        indirect: bool,
        limits: &mut Limits,
    ) -> Outlook {
        if status == Status::Failed {
            return Outlook::Failed(IoError::Device);
        }
        match job.work.code {
            Code::Read | Code::Write if indirect => {
                // Without tables, then: the job is still whole.
                limits.indirect_segments = 0;
                match job.outlook {
                    Outlook::Done => Outlook::Again,
                    outlook => outlook,
                }
            }
            Code::Flush => {
                // A disk without flush or barriers has no write cache to flush, as far as anyone
                // can tell; so the request is done, as it is on a disk that never offered one.
                self.flush = false;
                job.work.code = Code::Barrier;
                if self.barrier { Outlook::Again } else { Outlook::Done }
            }
            Code::Barrier => {
                self.barrier = false;
                Outlook::Done
            }
            Code::Discard => {
                self.discard = None;
                Outlook::Failed(IoError::Unsupported)
            }
            Code::SecureDiscard => {
                self.secure_discard = false;
                Outlook::Failed(IoError::Unsupported)
            }
            Code::WriteZeroes | Code::WriteZeroesMayUnmap => {
                self.write_zeroes = false;
                Outlook::Failed(IoError::Unsupported)
            }
            Code::Read | Code::Write => Outlook::Failed(IoError::Unsupported),
        }
    }
}

/// What a job does.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub(super) code: Code,
    pub(super) sector: u64,
    pub(super) sectors: u64,
}

impl Work {
    /// Checks the sectors against the disk.
    #[inline(always)]
    pub(super) fn extent(&self, geometry: &Geometry) -> Result<Extent, ExtentError> {
        match self.code {
            Code::Read => geometry.extent(self.sector, self.sectors),
            _ => geometry.writable_extent(self.sector, self.sectors),
        }
    }

    /// Checks a request that moves data against the disk, and lends its buffer. Returns how much
    /// there is to do; see [`amount`](Self::amount).
    pub(super) fn check_transfer<H>(
        &self,
        geometry: &Geometry,
        buffer: &mut impl Payload<H>,
    ) -> Result<u64, SubmitError> {
        let bytes = self.extent(geometry)?.bytes();
        // A cursor counts in 32 bits.
        if bytes > u64::from(u32::MAX) || !buffer.holds(bytes, geometry.logical_bytes) {
            return Err(SubmitError::Buffer);
        }
        let access = if self.code == Code::Read { Access::ReadWrite } else { Access::Read };
        buffer.lend(bytes, access)?;
        Ok(bytes)
    }

    /// Checks a request without data against the disk, and cuts it down to what the disk does.
    /// Returns how much there is to do; see [`amount`](Self::amount).
    pub(super) fn check_command(
        &mut self,
        geometry: &Geometry,
        features: &Features,
    ) -> Result<u64, SubmitError> {
        if !self.code.is_range() {
            self.code = if features.flush { Code::Flush } else { Code::Barrier };
            return Ok(u64::from(features.flush || features.barrier));
        }
        let extent = self.extent(geometry)?;
        if matches!(self.code, Code::WriteZeroes | Code::WriteZeroesMayUnmap) {
            let sectors = features.write_zeroes.then_some(self.sectors);
            return sectors.ok_or(SubmitError::Unsupported);
        }
        let units = features.discard.ok_or(SubmitError::Unsupported)?;
        let secure = self.code == Code::SecureDiscard;
        if secure && !features.secure_discard {
            return Err(SubmitError::Unsupported);
        }
        let inside = units.inside(extent);
        if secure && inside != Some((extent.first(), extent.count())) {
            return Err(ExtentError::Misaligned.into());
        }
        (self.sector, self.sectors) = inside.unwrap_or_default();
        Ok(self.sectors)
    }

    /// Checks what was taken for one disk against another one. Returns how much there is to do; see
    /// [`amount`](Self::amount).
    pub(super) fn recheck<H>(
        &mut self,
        buffer: Option<&impl Payload<H>>,
        geometry: &Geometry,
        features: &Features,
    ) -> Result<u64, IoError> {
        match buffer {
            Some(buffer) => {
                let bytes = self.extent(geometry).map_err(|_| IoError::Device)?.bytes();
                let holds = buffer.holds(bytes, geometry.logical_bytes);
                if holds { Ok(bytes) } else { Err(IoError::Device) }
            }
            None => {
                if self.code.is_range() {
                    self.extent(geometry).map_err(|_| IoError::Device)?;
                }
                self.check_command(geometry, features).map_err(|_| IoError::Unsupported)
            }
        }
    }

    /// How much there is to do: bytes of a transfer, sectors of a range without data. A flush counts
    /// as one.
    pub(super) fn amount(&self) -> u64 {
        match self.code {
            Code::Read | Code::Write => self.sectors * u64::from(SECTOR_BYTES),
            Code::Flush | Code::Barrier => 1,
            _ => self.sectors,
        }
    }

    /// The most sectors of a range that go into one request: whole units of the disk, as far as the
    /// limits allow.
    pub(super) fn most(
        &self,
        limits: &RangeLimits,
        geometry: &Geometry,
        features: &Features,
    ) -> u64 {
        let logical = u64::from(geometry.logical_bytes / SECTOR_BYTES).max(1);
        let units = features.discard.map_or(1, |units| u64::from(units.granularity));
        let (most, unit) = match self.code {
            Code::Discard => (limits.discard, units),
            Code::SecureDiscard => (limits.secure_discard, units),
            Code::WriteZeroes | Code::WriteZeroesMayUnmap => (limits.write_zeroes, 1),
            Code::Read | Code::Write | Code::Flush | Code::Barrier => return 1,
        };
        let unit = if unit > most || unit < logical { logical } else { unit };
        (most / unit * unit).max(logical)
    }
}

/// A job: a user's request, unsplit.
pub(super) struct Job<P> {
    pub(super) work: Work,
    pub(super) buffer: Option<P>,
    /// The order of submission.
    pub(super) sequence: u64,
    /// Its `sequence`, if all of it is on the wire as one request without tables, which goes by the
    /// job's own tag. What follows says nothing then. [`IN_PARTS`] otherwise.
    pub(super) whole: u64,
    /// Up to where the buffer is on the wire.
    pub(super) cursor: Cursor,
    /// How much is not on the wire yet; see [`Work::amount`].
    pub(super) left: u64,
    /// Parts that were not answered yet.
    pub(super) outstanding: u32,
    pub(super) outlook: Outlook,
}

/// What is to become of a job once all of its parts are answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outlook {
    Done,
    /// The answers so far do not count: do all of it again.
    Again,
    Failed(IoError),
}

impl<P> Job<P> {
    pub(super) fn empty() -> Self {
        Self {
            work: Work { code: Code::Flush, sector: 0, sectors: 0 },
            buffer: None,
            sequence: 0,
            whole: IN_PARTS,
            cursor: Cursor::default(),
            left: 0,
            outstanding: 0,
            outlook: Outlook::Done,
        }
    }

    /// A new job, without a buffer yet. [`rewind`](Self::rewind) or `whole` is next.
    #[inline(always)]
    pub(super) fn begin(&mut self, work: Work, sequence: u64) {
        self.work = work;
        self.sequence = sequence;
        // It was taken out at the end of the last job. So nothing is lost, and nothing dropped.
        core::mem::forget(self.buffer.take());
    }

    /// Nothing of it is done, and `left` is to be put on the wire.
    pub(super) fn rewind(&mut self, left: u64) {
        self.whole = IN_PARTS;
        self.cursor = Cursor::default();
        self.left = left;
        self.outstanding = 0;
        self.outlook = Outlook::Done;
    }
}

/// One request on the wire, of those into which a job was cut.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// `None` only before the first use.
    pub(super) job: Option<Tag>,
    pub(super) chain: Chain,
    /// How many parts were staged before it.
    pub(super) number: u64,
}

impl Part {
    pub(super) const EMPTY: Self = Self { job: None, chain: Chain::EMPTY, number: 0 };
}

/// Of a job that is not on the wire as a whole: no answer is one to all of it.
pub(super) const IN_PARTS: u64 = u64::MAX;

/// Set in the id of a part, so that it is not one of a job that is on the wire as a whole.
pub(super) const PART: u64 = 1 << 63;
