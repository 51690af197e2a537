//! A frontend's end of a ring without the driver, for guests that do what the driver never does.
//!
//! Slots are written by offsets of its own (`xen/include/public/io/blkif.h`, 64-bit layout).

use alloc::format;
use alloc::string::{String, ToString};
use core::sync::atomic::Ordering;

use pvblk::memory::{Access, SharedPages};
use pvblk_xen::grants::GrantTo;
use pvblk_xen::platform::{EventChannels, Port};
use pvblk_xen::store::{Nodes, Store};
use pvblk_xen::xenbus::{self, Device, State};
use xen_guest::Guest;

/// Offsets in the ring's page, and its shape.
pub const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
pub const RSP_PROD: usize = 8;
pub const RSP_EVENT: usize = 12;
const SLOTS_AT: usize = 64;
pub const SLOT_BYTES: usize = 112;
pub const SLOTS: u32 = 32;
/// Offsets in a slot.
pub const DETAIL: usize = 1;
pub const TABLE_SEGMENTS: usize = 2;
pub const ID: usize = 8;
pub const SECTOR: usize = 16;
pub const SEGMENTS: usize = 24;
pub const DISCARD_SECTORS: usize = 24;
pub const TABLE_REFERENCES: usize = 28;
/// Of an answer.
pub const ANSWER_ID: usize = 0;
pub const STATUS: usize = 10;

pub const OKAY: u16 = 0;

pub const READ: u8 = 0;
pub const WRITE: u8 = 1;
pub const FLUSH: u8 = 3;

/// How long it waits for anything, in nanoseconds: a disk is there only when others are at work.
pub const PATIENCE: u64 = 200_000_000_000;

type Pages = SharedPages<GrantTo<&'static Guest>>;

/// A ring that was negotiated, and pages for what goes over it.
pub struct Connection {
    pub store: Store<&'static Guest>,
    pub guest: &'static Guest,
    pub device: Device,
    /// The ring is in the first one.
    pub pages: Pages,
    pub port: Port,
}

impl Connection {
    /// Connects as one should.
    pub fn open(
        store: &Store<&'static Guest>,
        guest: &'static Guest,
        number: u32,
        pages: usize,
        keeps: bool,
    ) -> Result<Self, String> {
        let device = wait(guest, || Ok(Device::read(store, "vbd", number).ok()))
            .map_err(|error| format!("there is no disk {number}: {error}"))?;
        let lender = GrantTo::new(guest, device.backend_id, pages as u32);
        let pages = Pages::new(lender, pages, Access::ReadWrite).map_err(text)?;
        let port = guest.allocate_unbound(device.backend_id).map_err(text)?;
        let it = Self { store: store.clone(), guest, device, pages, port };
        it.tell(State::Initialising)?;
        it.wait_for(&[State::InitWait])?;
        it.publish(keeps)?;
        it.wait_for(&[State::Connected])?;
        it.tell(State::Connected)?;
        Ok(it)
    }

    /// Makes the ring, and tells the backend where it is.
    fn publish(&self, keeps: bool) -> Result<(), String> {
        // No notification is asked for yet.
        self.pages.region().store_u32(REQ_EVENT, 1, Ordering::Relaxed);
        self.pages.region().store_u32(RSP_EVENT, u32::MAX, Ordering::Release);
        let path = &self.device.path;
        let publish = self.store.transaction(|nodes| {
            let reference = self.pages.handle(0);
            nodes.write_number(&format!("{path}/ring-ref"), reference.0.into())?;
            nodes.write_number(&format!("{path}/event-channel"), self.port.0.into())?;
            nodes.write(&format!("{path}/protocol"), "x86_64-abi")?;
            nodes.write_number(&format!("{path}/feature-persistent"), keeps.into())?;
            xenbus::write_state(nodes, path, State::Initialised)
        });
        publish.map_err(text)
    }

    /// What a kernel does that has replaced this one while the backend is dead, as Linux after a kexec:
    /// it asks for an orderly end, in vain; and as the backend's node says that it is connected, it
    /// publishes a ring of its own and goes on at once. The backend must have let go of all pages.
    ///
    /// The new ring has the references and the event channel of the old one: a kernel hands them out in
    /// the same order each time that it starts.
    pub fn replace(mut self, keeps: bool) -> Result<Self, String> {
        let (ring, port) = (self.pages.handle(0), self.port);
        self.pages.reclaim().map_err(|error| format!("the backend is dead: {error}"))?;
        self.guest.close(self.port);
        for state in [State::Closing, State::Closed, State::Initialising] {
            self.tell(state)?;
        }
        let Self { store, guest, device, pages, .. } = self;
        let count = pages.count();
        drop(pages);
        let lender = GrantTo::new(guest, device.backend_id, count as u32);
        let mut pages = Pages::new(lender, count, Access::ReadWrite).map_err(text)?;
        // What came back last is handed out first: once more, and they are in the old order.
        pages.reclaim().map_err(text)?;
        pages.lend(count, Access::ReadWrite).map_err(text)?;
        let new_port = guest.allocate_unbound(device.backend_id).map_err(text)?;
        if (pages.handle(0), new_port) != (ring, port) {
            return Err("the new ring has another reference or another port".into());
        }
        let it = Self { store, guest, device, pages, port };
        it.publish(keeps)?;
        it.wait_for(&[State::Connected])?;
        it.tell(State::Connected)?;
        Ok(it)
    }

    /// Closes this end too. Then the backend must have let go of every page.
    pub fn close(mut self) -> Result<(), String> {
        self.tell(State::Closed)?;
        self.wait_for(&[State::Closed])?;
        self.guest.close(self.port);
        self.pages.reclaim().map_err(|error| format!("after the ring was closed: {error}"))
    }

    fn tell(&self, state: State) -> Result<(), String> {
        xenbus::write_state(&self.store, &self.device.path, state).map_err(text)
    }

    pub fn wait_for(&self, states: &[State]) -> Result<(), String> {
        let path = &self.device.backend_path;
        let state = || xenbus::read_state(&self.store, path).map_err(text);
        wait(self.guest, || Ok(states.contains(&state()?).then_some(())))
            .map_err(|error| format!("the backend is to be one of {states:?}: {error}"))
    }
}

/// Looks again and again until there is something.
pub fn wait<R>(guest: &Guest, look: impl Fn() -> Result<Option<R>, String>) -> Result<R, String> {
    let deadline = guest.now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        let now = guest.now();
        if now > deadline {
            return Err("nothing happens".to_string());
        }
        EventChannels::wait(guest, Some(now + 2_000_000));
    }
}

/// Where the slot of this request or answer is.
pub fn slot_at(index: u32) -> usize {
    SLOTS_AT + (index % SLOTS) as usize * SLOT_BYTES
}

pub fn text(error: impl ToString) -> String {
    error.to_string()
}
