//! The life of a disk: connecting, resizing, starting again after a fault of the device, closing.

use alloc::sync::Arc;
use alloc::vec::Vec;

use pvblk::buffer::Pool;
use pvblk::extent::Geometry;
use pvblk::frontend::queue::Queue;
use pvblk::memory::{Access, PagesError, SharedPages};
use pvblk_virtio::block::Lifetime;
use pvblk_virtio::feature::Features;
use pvblk_virtio::queue::DriverQueue;
use pvblk_virtio::transport::{Interrupt, Status, Transport};

use crate::config::{Config, QUEUES_MAX, REQUESTS_MIN};
use crate::error::Error;
use crate::fmt::message;
use crate::identify::{self, Name};
use crate::line::DeviceLine;
use crate::negotiation::negotiate;
use crate::properties::Properties;
use crate::queues::Queues;
use crate::session::{self, Session};
use crate::{DiskQueue, Lender, Ring, ring};

/// What an interrupt tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The device's configuration and status.
    Configuration,
    /// The answers of the queue with this number.
    Queue(u16),
}

/// What [`Disk::advance`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Nothing that a user of the disk would notice.
    Nothing,
    /// The disk has another shape now.
    Resized(Geometry),
    /// The device could not go on, and was reset. Requests that it had not answered are on their way
    /// again.
    Reset,
    /// The device is gone. Requests have failed.
    Removed,
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Negotiated {
    /// The features that the device offered and this driver accepted.
    pub features: Features,
    /// Queues in use.
    pub queues: u16,
    /// Descriptors in each of them. (The least of all queues.)
    pub queue_size: u16,
    /// Segments in one request with a table, 0 if there are no tables. (The least of all queues.)
    pub indirect_segments: u32,
    /// The properties of the disk.
    pub properties: Properties,
    /// The disk's name, if it has one and was asked for it.
    pub name: Option<Name>,
    /// How worn the disk is, if it knows and was asked.
    pub lifetime: Option<Lifetime>,
}

/// One virtio-blk device.
///
/// It owns the negotiation; the data goes through the queues, which belong to whoever uses them.
pub struct Disk<T: Transport, I: Interrupt, Q: DriverQueue> {
    transport: T,
    lender: Lender<Q>,
    config: Config,
    /// That of the configuration.
    interrupt: I,
    session: Arc<Session>,
    generation: u32,
    negotiated: Option<Negotiated>,
}

/// A disk and its queues.
pub type Connected<T, I, Q> = (Disk<T, I, Q>, Vec<DiskQueue<T, I, Q>>);

/// A device that agreed on features and has its queues, but may not use them yet.
struct Ready<T: Transport, Q: DriverQueue> {
    features: Features,
    properties: Properties,
    generation: u32,
    session: Arc<Session>,
    rings: Vec<Ring<T, Q>>,
}

impl<T, I, Q> Disk<T, I, Q>
where
    T: Transport + Clone,
    I: Interrupt,
    Q: DriverQueue,
    Lender<Q>: Clone,
{
    /// Connects the device, and sleeps until it has said its name.
    ///
    /// `lender` shares memory with the device. `interrupts` gives a listener for the configuration and
    /// for each queue; they may all listen to the same interrupt.
    ///
    /// # Errors
    ///
    /// [`Error`]; the device is reset then.
    pub fn connect(
        transport: T,
        lender: Lender<Q>,
        interrupts: impl FnMut(Source) -> Option<I>,
        config: &Config,
    ) -> Result<Connected<T, I, Q>, Error> {
        Self::open(&transport, lender, interrupts, config).inspect_err(|error| {
            message!(error, "virtio-blk: {}", error);
            // The error matters more than what goes wrong with this.
            let _ = session::reset(&transport);
        })
    }

    fn open(
        transport: &T,
        lender: Lender<Q>,
        mut interrupts: impl FnMut(Source) -> Option<I>,
        config: &Config,
    ) -> Result<Connected<T, I, Q>, Error> {
        // Dropped after the rings: a device that did not answer may write to it until it is reset.
        let page = match config.identify {
            true => Some(SharedPages::new(lender.clone(), 1, Access::ReadWrite)?),
            false => None,
        };
        let ready = prepare::<T, Q>(transport, &lender, config, config.queues)?;
        let Ready { features, properties, generation, session, mut rings } = ready;
        let interrupt = interrupts(Source::Configuration).ok_or(Error::NoInterrupt)?;
        let mut lines = Vec::new();
        for queue in 0..rings.len() as u16 {
            let interrupt = interrupts(Source::Queue(queue)).ok_or(Error::NoInterrupt)?;
            lines.push(DeviceLine::new(transport.clone(), queue, interrupt, session.clone()));
        }
        session.begin(transport);
        interrupt.rearm();
        lines.iter().for_each(|line| line.interrupt().rearm());

        let (mut name, mut lifetime) = (None, None);
        if let (Some(page), Some(ring), Some(line)) = (&page, rings.first_mut(), lines.first()) {
            name = identify::name::<T, I, Q>(ring, line, page)?;
            if features.contains(Features::LIFETIME) {
                lifetime = identify::lifetime::<T, I, Q>(ring, line, page)?;
            }
        }

        let mut disk = Self {
            transport: transport.clone(),
            lender,
            config: config.clone(),
            interrupt,
            session,
            generation,
            negotiated: None,
        };
        let mut queues = Vec::new();
        for (ring, line) in rings.iter().zip(lines) {
            let size = ring.wire.queue().size();
            let requests = config.requests.unwrap_or(size.max(REQUESTS_MIN));
            let frontend = crate::Frontend::new(requests, properties.geometry, properties.features);
            queues.push(Queue::new(frontend, line, None));
        }
        disk.attach(&mut queues, rings, features, properties);
        if let Some(negotiated) = &mut disk.negotiated {
            (negotiated.name, negotiated.lifetime) = (name, lifetime);
        }
        // Last, from what is left: the rings and the tables matter more.
        for queue in &mut queues {
            queue.set_bounce(ring::bounce_pool(&disk.lender, config));
        }
        Ok((disk, queues))
    }

    /// Gives each queue its ring.
    fn attach(
        &mut self,
        queues: &mut impl Queues<T, I, Q>,
        rings: Vec<Ring<T, Q>>,
        features: Features,
        properties: Properties,
    ) {
        let mut rings = rings.into_iter();
        let (mut count, mut size, mut segments) = (0, u16::MAX, u32::MAX);
        queues.for_each(&mut |_, queue| {
            let Some(ring) = rings.next() else {
                // The device has fewer queues now: what waits here has nowhere to go.
                drop(queue.frontend().close());
                return;
            };
            size = size.min(ring.wire.queue().size());
            let link = ring::link::<T, Q>(&self.lender, ring, features, &properties, &self.config);
            segments = segments.min(link.limits.indirect_segments as u32);
            count += 1;
            queue.line().reconnect(self.session.clone());
            queue.frontend().attach(link, properties.geometry, properties.features);
        });
        message!(
            info,
            "virtio-blk: connected, {} queues of {} descriptors, {} segments, {} sectors",
            count,
            size,
            segments,
            properties.geometry.sectors,
        );
        self.negotiated = Some(Negotiated {
            features,
            queues: count,
            queue_size: size,
            indirect_segments: segments,
            properties,
            name: self.negotiated.and_then(|before| before.name),
            lifetime: self.negotiated.and_then(|before| before.lifetime),
        });
        queues.for_each(&mut |_, queue| queue.commit());
    }

    /// Whether the device has said something that [`advance`](Self::advance) is there for.
    pub fn has_news(&self) -> bool {
        self.interrupt.is_held() || self.session.has_changed()
    }

    /// Follows the device: call it after interrupts, as often as you like, and when a queue says that
    /// its device hung up.
    ///
    /// # Errors
    ///
    /// [`Error`] if the device had to be reset, and could not be connected again. Requests wait: this
    /// may be called once more, and [`close`](Self::close) ends them.
    pub fn advance(&mut self, queues: &mut impl Queues<T, I, Q>) -> Result<Change, Error> {
        let Some(negotiated) = &self.negotiated else { return Ok(Change::Nothing) };
        if self.interrupt.is_held() {
            self.session.acknowledge(&self.transport);
            self.interrupt.rearm();
        }
        let status = self.transport.status();
        if status.is_all() {
            return Ok(self.remove(queues));
        }
        if status.contains(Status::NEEDS_RESET) || !status.contains(Status::DRIVER_OK) {
            return self.start_again(queues).inspect_err(|error| {
                message!(error, "virtio-blk: {}", error);
                // The error matters more than what goes wrong with this.
                let _ = session::reset(&self.transport);
            });
        }
        let generation = self.transport.generation();
        if !self.session.take_changed() && generation == self.generation {
            return Ok(Change::Nothing);
        }
        self.generation = generation;
        let properties = Properties::read(&self.transport, negotiated.features)?;
        let geometry = properties.geometry;
        if geometry == negotiated.properties.geometry {
            return Ok(Change::Nothing);
        }
        if let Some(negotiated) = &mut self.negotiated {
            negotiated.properties.geometry = geometry;
        }
        queues.for_each(&mut |_, queue| queue.frontend().set_geometry(geometry));
        Ok(Change::Resized(geometry))
    }

    fn remove(&mut self, queues: &mut impl Queues<T, I, Q>) -> Change {
        message!(warn, "virtio-blk: the device is gone");
        queues.for_each(&mut |_, queue| drop(queue.frontend().close()));
        self.negotiated = None;
        Change::Removed
    }

    /// Resets the device and connects it again. What it did not answer is done once more.
    fn start_again(&mut self, queues: &mut impl Queues<T, I, Q>) -> Result<Change, Error> {
        message!(warn, "virtio-blk: the device needs a reset");
        self.session.end(&self.transport)?;
        let mut count = 0;
        queues.for_each(&mut |_, queue| {
            drop(queue.frontend().detach());
            count += 1;
        });
        let ready = prepare::<T, Q>(&self.transport, &self.lender, &self.config, count)?;
        self.session = ready.session;
        self.generation = ready.generation;
        self.session.begin(&self.transport);
        self.attach(queues, ready.rings, ready.features, ready.properties);
        Ok(Change::Reset)
    }

    /// Closes the disk: the device is reset, and lets go of everything. Requests that are still in
    /// flight fail, so finish them first. The completions can still be had from the queues.
    ///
    /// # Errors
    ///
    /// [`Error::Stuck`] if the device does not finish its reset.
    pub fn close(&mut self, queues: &mut impl Queues<T, I, Q>) -> Result<(), Error> {
        let outcome = self.session.end(&self.transport);
        queues.for_each(&mut |_, queue| drop(queue.frontend().close()));
        self.negotiated = None;
        outcome
    }

    /// What the connection came to, once there is one. It stays while the disk is being connected again.
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// Makes a pool of registered buffers: a request with one costs no copy.
    ///
    /// # Errors
    ///
    /// [`PagesError`] if memory does not suffice.
    pub fn register(
        &self,
        count: u32,
        bytes_each: usize,
    ) -> Result<Arc<Pool<Lender<Q>>>, PagesError> {
        Pool::new(self.lender.clone(), count, bytes_each)
    }

    /// The way to share memory with this disk's device, for
    /// [`OwnedPages`](pvblk::buffer::OwnedPages).
    pub fn lender(&self) -> Lender<Q> {
        self.lender.clone()
    }
}

/// Brings a device from whatever state to the one before it may use its queues.
fn prepare<T: Transport + Clone, Q: DriverQueue>(
    transport: &T,
    lender: &Lender<Q>,
    config: &Config,
    queues: u16,
) -> Result<Ready<T, Q>, Error>
where
    Lender<Q>: Clone,
{
    let features = negotiate::<Q>(transport, config)?;
    if let (true, Some(wanted)) = (features.contains(Features::CONFIG_WCE), config.write_cache) {
        let field = core::mem::offset_of!(pvblk_virtio::block::Config, write_back);
        if !transport.set_config8(field, u8::from(wanted)) {
            return Err(Error::BadConfiguration);
        }
    }
    let generation = transport.generation();
    let properties = Properties::read(transport, features)?;
    let session = Arc::new(Session::default());
    let mut rings = Vec::new();
    for number in 0..queues.clamp(1, properties.queues.min(QUEUES_MAX)) {
        match ring::open::<T, Q>(transport, lender, &session, number, features, config) {
            Ok(Some(ring)) => rings.push(ring),
            // Fewer queues are better than none.
            Err(error) if rings.is_empty() => return Err(error),
            _ => break,
        }
    }
    if rings.is_empty() {
        return Err(Error::BadDevice {
            field: "queue_size",
            value: transport.queue_size(0).into(),
            reason: "a disk has a queue with room for a request",
        });
    }
    Ok(Ready { features, properties, generation, session, rings })
}
