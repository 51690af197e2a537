//! Disks of this domain that are on their way: the toolstack has attached them, here or at the start,
//! and their backends have not connected yet.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use pvblk_xen::store::{Error, Store, WatchId};
use pvblk_xen::xenbus::{self, State};
use xen_guest::{Guest, println};

use crate::own_disk::OwnDisk;
use crate::target::device_name;

type Connecting = Pin<Box<dyn Future<Output = Result<OwnDisk, String>>>>;

/// Looks for disks of this domain, and connects them without ever waiting for their backends: other
/// guests are served meanwhile.
pub struct Arrivals {
    guest: &'static Guest,
    store: Store<&'static Guest>,
    watch: WatchId,
    /// Woken when XenStore has something to say.
    waker: Waker,
    /// Queues to ask for.
    queues: u32,
    /// Look, even without an event.
    again: bool,
    /// Whether the disks that were there from the start have been looked for.
    begun: bool,
    /// By their numbers.
    coming: Vec<(u32, Connecting)>,
}

impl Arrivals {
    /// Begins to look.
    pub fn watch(
        guest: &'static Guest,
        store: &Store<&'static Guest>,
        waker: Waker,
        queues: u32,
    ) -> Result<Self, Error> {
        let watch = store.watch("device/vbd")?;
        let (again, begun, coming) = (true, false, Vec::new());
        let store = store.clone();
        Ok(Self { guest, store, watch, waker, queues, again, begun, coming })
    }

    /// The disks that have come since the last time. `own` are those that had come before.
    pub fn follow(&mut self, own: &[OwnDisk]) -> Result<Vec<OwnDisk>, Error> {
        self.again |= self.store.take(self.watch);
        if self.again {
            self.scan(own)?;
            (self.again, self.begun) = (false, true);
        }
        let mut come = Vec::new();
        let mut context = Context::from_waker(&self.waker);
        self.coming.retain_mut(|(number, connecting)| {
            match connecting.as_mut().poll(&mut context) {
                Poll::Pending => return true,
                Poll::Ready(Ok(disk)) => {
                    println!("{disk}: connected");
                    come.push(disk);
                }
                Poll::Ready(Err(reason)) => println!("own {}: {reason}", device_name(*number)),
            }
            false
        });
        Ok(come)
    }

    /// Looks again, since a disk of this domain is gone: another may be in its place.
    pub fn look_again(&mut self) {
        self.again = true;
    }

    fn scan(&mut self, own: &[OwnDisk]) -> Result<(), Error> {
        let numbers = xenbus::devices(&self.store, "vbd")?;
        self.coming.retain(|(number, _)| numbers.contains(number));
        for number in numbers {
            let is_known = own.iter().any(|disk| disk.number == number)
                || self.coming.iter().any(|(other, _)| *other == number);
            if !is_known && self.is_new(number)? {
                let connecting =
                    OwnDisk::connect(self.store.clone(), self.guest, number, self.queues);
                self.coming.push((number, Box::pin(connecting)));
            }
        }
        Ok(())
    }

    /// Whether a disk is to be connected. What an earlier program of this domain left behind is, at the
    /// start; later, one that has begun and ended stays there until the toolstack takes it away.
    fn is_new(&self, number: u32) -> Result<bool, Error> {
        let state = xenbus::read_state(&self.store, &format!("device/vbd/{number}"))?;
        Ok(!self.begun || state == State::Initialising)
    }
}
