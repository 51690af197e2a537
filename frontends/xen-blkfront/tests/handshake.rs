//! Finding, connecting and closing a disk.
#![allow(missing_docs)]

mod common;

use common::*;
use pvblk_simulated::blkback::BackendConfig;
use xen_blkfront::Config;

#[test]
fn a_disk_is_connected_used_and_closed() {
    let rig = Rig::new(BackendConfig::default());
    {
        let store = rig.store();
        let (mut disk, mut queues) = rig.connect(&store, &Config::default()).unwrap();
        let bytes = pattern(7, 100, 1);
        queues[0].write(7, &bytes).unwrap();
        queues[0].flush().unwrap();
        let mut back = vec![0; bytes.len()];
        queues[0].read(7, &mut back).unwrap();
        assert!(back == bytes);
        assert!(rig.backend.read_disk(7 * 512, bytes.len()) == bytes);
        disk.close(&mut queues).unwrap();
    }
    rig.assert_clean();
}
