//! The resources of one queue's connection: ring, event channel, indirect tables.

use alloc::vec::Vec;

use pvblk::buffer::Pool;
use pvblk::frontend::Link;
use pvblk::indirect::TablePool;
use pvblk::memory::{Access, PagesError, Share, ShareError};
use pvblk_xen::abi::ENTRIES_PER_PAGE;
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{GrantRef, Platform, Port};
use pvblk_xen::wire::{self, FrontRing};

use crate::Lender;
use crate::config::Config;
use crate::error::Error;
use crate::offer;

/// A ring that the backend can be told of.
pub(crate) struct Ring<P: Platform> {
    pub ring: FrontRing<Lender<P>>,
    pub port: Port,
}

impl<P: Platform> Ring<P> {
    fn open(platform: &P, lender: &Lender<P>, order: u32, handle: u16) -> Result<Self, Error> {
        let ring = FrontRing::new(lender.clone(), order, handle)?;
        let port = platform.allocate_unbound(lender.peer())?;
        Ok(Self { ring, port })
    }

    pub fn references(&self) -> Vec<GrantRef> {
        let pages = self.ring.pages();
        (0..pages.count()).map(|page| pages.handle(page)).collect()
    }
}

/// Opens as many rings of the same order as are asked for and can be had; at least one.
///
/// Where the grant table is nearly full, small rings are better than few, and few better than none.
pub(crate) fn open_rings<P: Platform>(
    platform: &P,
    lender: &Lender<P>,
    queues: u32,
    order: u32,
    handle: u16,
) -> Result<(Vec<Ring<P>>, u32), Error> {
    let mut order = order;
    loop {
        let mut rings = Vec::new();
        let mut failure = None;
        for _ in 0..queues {
            match Ring::open(platform, lender, order, handle) {
                Ok(ring) => rings.push(ring),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        match failure {
            Some(_) if order > 0 => order -= 1,
            Some(error) if rings.is_empty() => return Err(error),
            _ => return Ok((rings, order)),
        }
        for ring in rings {
            platform.close(ring.port);
        }
    }
}

/// Makes the engine's link out of a ring, with as many indirect tables as are asked for and can be
/// had.
pub(crate) fn link<P: Platform>(
    lender: &Lender<P>,
    ring: FrontRing<Lender<P>>,
    offer: &offer::Limits,
    config: &Config,
) -> Link<FrontRing<Lender<P>>> {
    let segments = config.indirect_segments.min(offer.indirect_segments) as usize;
    let limits = wire::limits(segments, usize::MAX / ENTRIES_PER_PAGE);
    let each = limits.indirect_segments.div_ceil(ENTRIES_PER_PAGE);
    let requests = (config.indirect_requests as usize).min(ring.slots() as usize);
    let wanted = u16::try_from(each * requests).unwrap_or(u16::MAX);
    // A backend that keeps pages mapped maps them all to write.
    let access = if lender.can_lend() { Access::Read } else { Access::ReadWrite };
    let tables =
        as_many(u32::from(wanted), |count| TablePool::new(lender.clone(), count as u16, 1, access))
            .unwrap_or_else(TablePool::empty);
    let limits = wire::limits(segments, tables.count());
    Link { wire: ring, limits, tables }
}

/// Makes the pool to bounce through, as large as is asked for and can be had.
pub(crate) fn bounce_pool<P: Platform>(
    lender: &Lender<P>,
    config: &Config,
) -> Option<alloc::sync::Arc<Pool<Lender<P>>>> {
    let mut bytes = config.bounce_bytes as usize;
    loop {
        let pool = as_many(config.bounce_buffers, |count| Pool::new(lender.clone(), count, bytes));
        if pool.is_some() || config.bounce_buffers == 0 || bytes <= 4096 {
            return pool;
        }
        bytes /= 2;
    }
}

/// Tries with half as many until it works.
fn as_many<R>(wanted: u32, make: impl Fn(u32) -> Result<R, PagesError>) -> Option<R> {
    let mut count = wanted;
    while count > 0 {
        match make(count) {
            Ok(made) => return Some(made),
            Err(PagesError::Share(ShareError::BadPage)) => return None,
            Err(_) => count /= 2,
        }
    }
    None
}

pub(crate) fn lender<P: Platform>(
    platform: P,
    peer: pvblk_xen::platform::DomainId,
    trusted: bool,
    config: &Config,
) -> Lender<P> {
    let lender = GrantTo::new(platform, peer, config.grant_budget);
    if trusted { lender } else { lender.untrusted() }
}
