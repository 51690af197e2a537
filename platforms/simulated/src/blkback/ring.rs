//! One ring, page by page: the pages of a ring need not follow each other.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use pvblk_xen::platform::Port;

use super::layout::{Abi, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SLOTS};
use super::pages::Persistent;
use super::requests::Pending;
use crate::Mapping;
use crate::faults::Random;

const PAGE: usize = 4096;

pub(super) struct Queue {
    pub(super) index: usize,
    pub(super) pages: Vec<Mapping>,
    pub(super) abi: Abi,
    pub(super) size: u32,
    pub(super) port: Port,
    pub(super) requests_consumed: u32,
    /// Private copy: what was written to the shared page may be hostile.
    pub(super) responses_produced: u32,
    /// What was published last.
    pub(super) responses_published: u32,
    pub(super) pending: Vec<Pending>,
    pub(super) persistent: BTreeMap<u32, Persistent>,
    /// There may be requests to take, and `req_event` is not armed.
    pub(super) awake: bool,
    /// Xen signals a new binding; that first event says nothing.
    pub(super) first_event: bool,
    pub(super) dead: bool,
    /// Ids that were answered, for replays.
    pub(super) old_ids: Vec<u64>,
}

impl Queue {
    pub(super) fn load(&self, offset: usize) -> u32 {
        self.pages[0].load_u32(offset, Ordering::Acquire)
    }

    pub(super) fn request_producer(&self) -> u32 {
        self.load(REQ_PROD)
    }

    /// Asks for a notification at the next request, and looks whether one is there already.
    pub(super) fn arm(&self) -> bool {
        let event = self.requests_consumed.wrapping_add(1);
        self.pages[0].store_u32(REQ_EVENT, event, Ordering::Relaxed);
        // The event must be visible before the producer is read, or both sides may sleep.
        fence(Ordering::SeqCst);
        self.request_producer() != self.requests_consumed
    }

    /// The next request, assembled from two pages where its slot straddles them.
    pub(super) fn take_slot(&mut self) -> [u8; 112] {
        let mut slot = [0; 112];
        let stride = self.abi.stride();
        let at = SLOTS + (self.requests_consumed & (self.size - 1)) as usize * stride;
        self.read(at, &mut slot[..stride]);
        self.requests_consumed = self.requests_consumed.wrapping_add(1);
        slot
    }

    fn read(&mut self, at: usize, bytes: &mut [u8]) {
        let (page, offset) = (at / PAGE, at % PAGE);
        let first = bytes.len().min(PAGE - offset);
        let (head, tail) = bytes.split_at_mut(first);
        self.pages[page].read_bytes(offset, head);
        if !tail.is_empty() {
            self.pages[page + 1].read_bytes(0, tail);
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let (page, offset) = (at / PAGE, at % PAGE);
        let (head, tail) = bytes.split_at(bytes.len().min(PAGE - offset));
        self.pages[page].write_bytes(offset, head);
        if !tail.is_empty() {
            self.pages[page + 1].write_bytes(0, tail);
        }
    }

    /// Writes an answer into the next slot; [`publish`](Self::publish) makes it visible.
    pub(super) fn put_response(
        &mut self,
        id: u64,
        operation: u8,
        status: i16,
        scribble: Option<&mut Random>,
    ) {
        let mut slot = [0; 112];
        let bytes = self.abi.response_bytes();
        slot[..8].copy_from_slice(&id.to_le_bytes());
        slot[8] = operation;
        slot[10..12].copy_from_slice(&status.to_le_bytes());
        let mut length = bytes;
        if let Some(random) = scribble {
            length = self.abi.stride();
            slot[bytes..length].fill_with(|| random.number() as u8);
        }
        let at = self.slot_at(self.responses_produced);
        self.write(at, &slot[..length]);
        self.responses_produced = self.responses_produced.wrapping_add(1);
    }

    fn slot_at(&self, index: u32) -> usize {
        SLOTS + (index & (self.size - 1)) as usize * self.abi.stride()
    }

    /// Writes random bytes over the answer before the newest ones, published or not.
    pub(super) fn spoil_response(&mut self, random: &mut Random) {
        let back = 1 + random.below(u64::from(self.size)) as u32;
        let at = self.slot_at(self.responses_produced.wrapping_sub(back));
        let bytes = random.number().to_le_bytes();
        self.write(at + random.index(4), &bytes);
    }

    /// Makes the answers visible. Says whether the frontend wants to be told.
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.responses_published, self.responses_produced);
        self.publish_producer(new);
        self.responses_published = new;
        fence(Ordering::SeqCst);
        let event = self.load(RSP_EVENT);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Writes any number as the response producer.
    pub(super) fn publish_producer(&self, producer: u32) {
        self.pages[0].store_u32(RSP_PROD, producer, Ordering::Release);
    }

    pub(super) fn set_request_event(&self, event: u32) {
        self.pages[0].store_u32(REQ_EVENT, event, Ordering::Release);
    }
}
