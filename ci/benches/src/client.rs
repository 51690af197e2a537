//! The client of our frontend engine, over any wire: what is counted.

use pvblk::buffer::Pool;
use pvblk::extent::{Geometry, SECTOR_BYTES};
use pvblk::frontend::{Features, Frontend, Link, Request, Wire};

use crate::blkif::Case;
use crate::{DISK_SECTORS, Random, Tally, alignment};

/// A user of a disk who always has as many reads in flight as the case says.
pub struct Client<W: Wire> {
    frontend: Frontend<W>,
    random: Random,
    sectors: u32,
    mask: u64,
    requests: u64,
    failed: u64,
    notifications: u64,
}

/// What is counted: one round of the client.
#[inline(never)]
fn client_round<W: Wire>(client: &mut Client<W>) {
    loop {
        match client.frontend.next() {
            Ok(Some(completion)) => {
                if completion.result.is_err() {
                    client.failed += 1;
                }
                let Some(buffer) = completion.buffer else { return };
                let (sector, sectors) = (client.random.sector(client.mask), client.sectors);
                if client.frontend.submit(Request::Read { sector, sectors, buffer }).is_err() {
                    client.failed += 1;
                }
            }
            Ok(None) => break,
            Err(_) => {
                client.failed += 1;
                break;
            }
        }
    }
    client.notifications += u64::from(client.frontend.commit());
}

impl<W: Wire> Client<W> {
    /// Connects a disk and fills its queue.
    pub fn new(link: Link<W>, share: W::Share, case: Case) -> Self {
        let geometry = Geometry {
            sectors: DISK_SECTORS,
            logical_bytes: SECTOR_BYTES,
            physical_bytes: SECTOR_BYTES,
            read_only: false,
        };
        let features = Features { flush: true, ..Features::default() };
        let mut frontend = Frontend::new(case.depth, geometry, features);
        frontend.attach(link, geometry, features);
        let pool = Pool::new(share, u32::from(case.depth), case.bytes).expect("there is memory");
        let sectors = (case.bytes / SECTOR_BYTES as usize) as u32;
        let (mask, mut random) = (alignment(sectors), Random::default());
        while let Some(buffer) = pool.take() {
            let sector = random.sector(mask);
            let request = Request::Read { sector, sectors, buffer: buffer.into() };
            assert!(frontend.submit(request).is_ok(), "there is room up to the depth");
        }
        frontend.commit();
        let requests = case.requests();
        Self { frontend, random, sectors, mask, requests, failed: 0, notifications: 0 }
    }

    /// Runs the case's requests, which `serve` answers between two rounds. `allocations` says how
    /// many allocations there were so far.
    pub fn run(&mut self, mut serve: impl FnMut(), allocations: impl Fn() -> u64) -> Tally {
        let mut tally = Tally::default();
        // Every completion makes room for one more request.
        let submitted = self.frontend.statistics().jobs;
        while tally.requests < self.requests {
            serve();
            let before = allocations();
            client_round(self);
            tally.allocations += allocations() - before;
            tally.requests = self.frontend.statistics().jobs - submitted;
        }
        assert_eq!(self.failed, 0, "every request is taken and succeeds");
        tally.notifications = self.notifications;
        tally
    }
}
