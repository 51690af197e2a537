//! Disks of every kind in one table, as an operating system has them.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk::frontend::{BlockDevice, Request};
use pvblk_simulated::Host;
use pvblk_simulated::blkback::{Backend, BackendConfig};
use pvblk_xen::platform::DomainId;
use pvblk_xen::store::Store;
use virtio_blk_driver::Config;

#[test]
fn a_table_holds_disks_over_blkif_and_over_both_kinds_of_virtqueue() {
    let host = Host::new(1);
    let front = host.domain(DomainId(5));
    let backend = Backend::new(&host, DomainId(0), DomainId(5), 51712, BackendConfig::default());
    let wanted = xen_blkfront::Config { queues: 2, ..xen_blkfront::Config::default() };
    let store = Store::new(front.clone());
    let connected = xen_blkfront::Disk::connect(&store, front.clone(), 51712, &wanted);
    let (mut xen, mut xen_queues) = connected.unwrap();

    let (split, packed) = (Board::usual(), Board::usual());
    let wanted = Config { queues: 1, identify: false, ..Config::default() };
    let (_split, mut split_queues) = split.connect::<SplitQueue>(&wanted).unwrap();
    let (_packed, mut packed_queues) = packed.connect::<PackedQueue>(&wanted).unwrap();

    {
        let table: [Box<dyn BlockDevice + Send + '_>; 3] = [
            Box::new(xen_queues.remove(0)),
            Box::new(split_queues.remove(0)),
            Box::new(packed_queues.remove(0)),
        ];
        for (version, mut disk) in table.into_iter().enumerate() {
            let data = pattern(version as u64, 24 * 512);
            disk.write(16, &data).unwrap();
            disk.flush().unwrap();
            disk.discard(48, 8).unwrap();
            let mut back = vec![0; data.len()];
            disk.read(16, &mut back).unwrap();
            assert!(data == back, "disk {version}");
            assert!(disk.features().discard.is_some());
            let end = disk.geometry().sectors;
            let error = disk.read(end, &mut [0; 512]).unwrap_err();
            assert_eq!(error.kind(), pvblk::frontend::ErrorKind::InvalidRequest);
        }
    }
    // What is refused says why, and is an error like any other.
    let refused = xen_queues[0].submit(Request::Discard { sector: u64::MAX, sectors: 1 });
    let error: Box<dyn std::error::Error> = Box::new(refused.unwrap_err());
    assert_eq!(error.to_string(), pvblk::extent::ExtentError::OutOfRange.to_string());
    xen.close(&mut xen_queues).unwrap();
    backend.assert_no_violations();
}
