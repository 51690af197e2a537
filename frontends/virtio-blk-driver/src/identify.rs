//! What a device tells of itself by requests: the disk's name, and how worn it is.

use pvblk::frontend::queue::Line;
use pvblk::frontend::{Status, Wire};
use pvblk::memory::SharedPages;
use pvblk_virtio::block::{ID_BYTES, Lifetime, kind};
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::transport::{Interrupt, Transport};
use zerocopy::FromBytes;

use crate::error::Error;
use crate::line::DeviceLine;
use crate::{Lender, Ring};

/// The name of a disk: up to 20 bytes, which the device makes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name([u8; ID_BYTES]);

impl Name {
    /// The name, without the zeroes that it is filled up with.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(ID_BYTES);
        &self.0[..end]
    }

    /// The name as text, if it is.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        core::str::from_utf8(self.bytes()).ok()
    }
}

/// Asks for the name.
pub(crate) fn name<T: Transport, I: Interrupt, Q: DriverQueue>(
    ring: &mut Ring<T, Q>,
    line: &DeviceLine<T, I>,
    page: &SharedPages<Lender<Q>>,
) -> Result<Option<Name>, Error> {
    Ok(ask::<_, _, Q, ID_BYTES>(ring, line, page, kind::GET_ID)?.map(Name))
}

/// Asks how worn the disk is. Only for devices that say that they know.
pub(crate) fn lifetime<T: Transport, I: Interrupt, Q: DriverQueue>(
    ring: &mut Ring<T, Q>,
    line: &DeviceLine<T, I>,
    page: &SharedPages<Lender<Q>>,
) -> Result<Option<Lifetime>, Error> {
    const BYTES: usize = size_of::<Lifetime>();
    let bytes = ask::<_, _, Q, BYTES>(ring, line, page, kind::GET_LIFETIME)?;
    Ok(bytes.and_then(|bytes| Lifetime::read_from_bytes(&bytes).ok()).map(|raw| Lifetime {
        reserve: u16::from_le(raw.reserve),
        wear_a: u16::from_le(raw.wear_a),
        wear_b: u16::from_le(raw.wear_b),
    }))
}

/// Asks one question, and sleeps until it is answered. `None` if the device does not know.
///
/// The answer comes to `page`, which must stay until the device is reset if this fails.
fn ask<T: Transport, I: Interrupt, Q: DriverQueue, const N: usize>(
    ring: &mut Ring<T, Q>,
    line: &DeviceLine<T, I>,
    page: &SharedPages<Lender<Q>>,
    kind: u32,
) -> Result<Option<[u8; N]>, Error> {
    const QUESTION: u64 = 0;
    ring.wire.stage_question(QUESTION, kind, page.handle(0).0, N as u32);
    if ring.commit() {
        line.notify();
    }
    let status = loop {
        if let Some(answer) = ring.take()? {
            break answer.status;
        }
        line.listen();
        if !ring.sleep(1)? && !line.wait() {
            return Err(Error::Removed);
        }
    };
    let mut bytes = [0; N];
    page.region().read_bytes(0, &mut bytes);
    Ok((status == Status::Done).then_some(bytes))
}
