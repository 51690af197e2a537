//! A disk, its queues and its client of XenStore in one value, which borrows nothing.
#![allow(missing_docs)]

mod common;

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use common::{Rig, XVDA, pattern};
use pvblk_simulated::Domain;
use pvblk_simulated::blkback::BackendConfig;
use pvblk_xen::platform::Platform;
use pvblk_xen::store::Store;
use xen_blkfront::{Change, Config, Disk, FrontQueue};

struct Drive<P: Platform> {
    disk: Disk<P>,
    queues: Vec<FrontQueue<P>>,
}

impl<P: Platform> Drive<P> {
    fn open(platform: P) -> Self {
        let store = Store::new(platform.clone());
        let connected = Disk::connect(&store, platform, XVDA, &Config::default());
        let (disk, queues) = connected.expect("there is a disk");
        Self { disk, queues }
    }

    fn write_and_read(&mut self, version: u64) {
        let data = pattern(40, 9, version);
        let mut back = vec![0; data.len()];
        self.queues[0].write(40, &data).unwrap();
        self.queues[0].read(40, &mut back).unwrap();
        assert!(data == back);
    }

    fn close(mut self) {
        self.disk.close(&mut self.queues).unwrap();
    }
}

/// Whoever has a domain by value, or in any pointer, has a platform.
#[test]
fn a_drive_can_be_returned_from_a_function_whatever_the_platform_is_held_by() {
    fn use_one<P: Platform>(hold: impl Fn(&Rig) -> P) {
        let rig = Rig::new(BackendConfig::default());
        let mut drive = Drive::open(hold(&rig));
        drive.write_and_read(1);
        drive.close();
        rig.assert_clean();
    }
    use_one(|rig| rig.front.clone());
    use_one(|rig| Rc::new(rig.front.clone()));
    use_one(|rig| Arc::new(rig.front.clone()));
    let rig = Rig::new(BackendConfig::default());
    let mut drive = Drive::open(&rig.front);
    drive.write_and_read(1);
    drive.close();
    rig.assert_clean();
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Store<Domain>>();
    is_send::<Drive<Domain>>();
    is_send::<Drive<Arc<Domain>>>();
    is_send::<Drive<&'static Domain>>();
};

/// One thread connects it, and others use it, follow its backend and close it, in turn.
#[test]
fn a_drive_in_a_static_is_used_by_one_thread_after_another() {
    static DRIVE: Mutex<Option<Drive<Domain>>> = Mutex::new(None);

    let rig = Rig::new(BackendConfig::default());
    *DRIVE.lock().unwrap() = Some(Drive::open(rig.front.clone()));
    rig.backend.resize(16384);
    for version in 0..3 {
        let used = std::thread::spawn(move || {
            let mut drive = DRIVE.lock().unwrap();
            let Drive { disk, queues } = drive.as_mut().expect("it is there");
            let change = disk.advance(queues).unwrap();
            assert_eq!(matches!(change, Change::Resized(_)), version == 0, "{change:?}");
            drive.as_mut().expect("it is there").write_and_read(version);
        });
        used.join().unwrap();
    }
    let drive = DRIVE.lock().unwrap().take().expect("it is there");
    std::thread::spawn(|| drive.close()).join().unwrap();
    rig.assert_clean();
}
