//! State machines of backends as shipped, without any ring: the frontend must not get stuck in the
//! gap between what it says and when the backend looks.
#![allow(missing_docs)]

mod common;

use std::sync::{Arc, Mutex};

use common::{BACK, FRONT, XVDA, config};
use pvblk_simulated::{Domain, Faults, Host, Random};
use pvblk_xen::store::Store;
use xen_blkfront::Disk;

/// Linux's `frontend_changed` in `drivers/block/xen-blkback/xenbus.c`, as far as states go. It acts
/// on the state that it reads, which may be a later one than that which woke it.
fn linux(front: u32, back: u32) -> u32 {
    match front {
        1 if back == 6 => 2,
        3 | 4 => 4,
        5 => 5,
        6 => 6,
        _ => back,
    }
}

/// Does what `react` says: looks a random number of steps after a change, and writes another
/// random number of steps after it looked. Returns what it saw.
fn serve(host: &Host, seed: u64, react: fn(u32, u32) -> u32) -> Arc<Mutex<Vec<u32>>> {
    let frontend = format!("/local/domain/{}/device/vbd/{XVDA}/state", FRONT.0);
    let backend = format!("/local/domain/{}/backend/vbd/{}/{XVDA}/state", BACK.0, FRONT.0);
    let (watch, inner) = (host.store_watch(&frontend), host.clone());
    let mut random = Random::new(seed);
    // What is there at the beginning it has seen before.
    watch.take_changes();
    let (mut woken, mut decided, mut sleep) = (false, None, 0);
    let history = Arc::new(Mutex::new(Vec::new()));
    let seen = history.clone();
    host.add_actor(Box::new(move || {
        if watch.take_changes() && !woken {
            woken = true;
            sleep = random.below(12);
        }
        if !woken && decided.is_none() {
            return false;
        }
        if sleep > 0 {
            sleep -= 1;
            return true;
        }
        sleep = random.below(12);
        if let Some(next) = decided.take() {
            inner.store_write(&backend, u32::to_string(&next));
            return true;
        }
        woken = false;
        let number = |path: &str| inner.store_read(path).and_then(|text| text.parse().ok());
        let (front, back) = (number(&frontend).unwrap_or(0), number(&backend).unwrap_or(0));
        seen.lock().unwrap().push(front);
        decided = Some(react(front, back)).filter(|next| *next != back);
        true
    }));
    history
}

fn start(front: &str, back: &str) -> (Host, Domain) {
    let host = Host::new(1);
    let domain = host.domain(FRONT);
    host.domain(BACK);
    let path = format!("/local/domain/{}/device/vbd/{XVDA}", FRONT.0);
    let backend = format!("/local/domain/{}/backend/vbd/{}/{XVDA}", BACK.0, FRONT.0);
    for (node, value) in [("state", back), ("sectors", "1000"), ("sector-size", "512")] {
        host.store_write(&format!("{backend}/{node}"), value);
    }
    for (node, value) in [("backend", &*backend), ("backend-id", "0"), ("state", front)] {
        host.store_write(&format!("{path}/{node}"), value);
    }
    (host, domain)
}

#[test]
fn a_leftover_device_comes_back_however_slowly_linux_looks() {
    for (front, back) in [
        ("1", "2"),
        ("6", "6"),
        ("4", "6"),
        ("4", "4"),
        ("2", "2"),
        ("3", "4"),
        ("5", "5"),
        ("6", "2"),
    ] {
        for seed in 0..12 {
            let (host, domain) = start(front, back);
            let history = serve(&host, seed, linux);
            // So slow that the backend has its say between any two requests.
            let slow = Faults { seed, slow_store_one_in: 2, ..Faults::default() };
            domain.set_faults(slow);
            let store = Store::new(&domain);
            let wanted = config(|c| (c.timeout, c.bounce_buffers) = (1_000_000_000, 0));
            let connected = Disk::connect(&store, &domain, XVDA, &wanted);
            let (mut disk, mut queues) = connected.unwrap_or_else(|error| {
                let history = history.lock().unwrap();
                panic!("left in {front}, {back}, seed {seed}: {error}; it saw {history:?}")
            });
            disk.close(&mut queues).unwrap();
            // And once more, from where that ended.
            let (disk, mut queues) = Disk::connect(&store, &domain, XVDA, &wanted).unwrap();
            disk.hand_over(&mut queues).unwrap();
            drop(queues);
            domain.assert_nothing_left();
        }
    }
}
