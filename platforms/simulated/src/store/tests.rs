//! XenStore through its wire.

use pvblk_xen::platform::{Clock, DomainId, StoreTransport};

use crate::{Domain, Faults, Host};

/// Sends one request and gives the type and the payload of each message up to its answer.
fn ask(domain: &Domain, kind: u32, transaction: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut bytes = Vec::new();
    for number in [kind, 77, transaction, payload.len() as u32] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let sent = domain.send(rest).unwrap();
        rest = &rest[sent..];
        if !rest.is_empty() {
            domain.wait_store(Some(domain.now() + 1_000_000));
        }
    }
    let mut messages = Vec::new();
    loop {
        let message = message(domain);
        let done = message.0 != 15;
        messages.push(message);
        if done {
            return messages;
        }
    }
}

fn message(domain: &Domain) -> (u32, Vec<u8>) {
    let mut header = [0; 16];
    fill(domain, &mut header);
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; number(12) as usize];
    fill(domain, &mut payload);
    (number(0), payload)
}

fn fill(domain: &Domain, mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        let count = domain.receive(bytes).unwrap();
        bytes = &mut bytes[count..];
        if count == 0 {
            domain.wait_store(Some(domain.now() + 1_000_000));
        }
    }
}

fn answer(domain: &Domain, kind: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
    let (answered, payload) = ask(domain, kind, transaction, payload).pop().unwrap();
    assert!(answered == kind || answered == 16);
    payload
}

fn frontend() -> (Host, Domain) {
    let host = Host::new(5);
    host.add_actor(Box::new(|| false));
    let domain = host.domain(DomainId(3));
    (host, domain)
}

#[test]
fn nodes_are_written_read_listed_and_removed() {
    let (host, domain) = frontend();
    assert_eq!(answer(&domain, 11, 0, b"device/vbd/1/state\x003"), b"OK\0");
    assert_eq!(host.store_read("/local/domain/3/device/vbd/1/state").as_deref(), Some("3"));
    assert_eq!(answer(&domain, 2, 0, b"/local/domain/3/device/vbd/1/state\0"), b"3");
    answer(&domain, 12, 0, b"device/vbd/2\0");
    assert_eq!(answer(&domain, 1, 0, b"device/vbd\0"), b"1\x002\0");
    assert_eq!(answer(&domain, 13, 0, b"device/vbd\0"), b"OK\0");
    assert_eq!(answer(&domain, 2, 0, b"device/vbd/1/state\0"), b"ENOENT\0");
    assert_eq!(answer(&domain, 10, 0, b"3\0"), b"/local/domain/3\0");
    assert_eq!(answer(&domain, 99, 0, b"\0"), b"ENOSYS\0");
}

#[test]
fn permissions_are_kept() {
    let (host, domain) = frontend();
    host.store_write("/local/domain/0/backend/vbd/3/1/state", "1");
    host.store_write("/local/domain/0/backend/vbd/4/1/state", "1");
    assert_eq!(answer(&domain, 2, 0, b"/local/domain/0/backend/vbd/3/1/state\0"), b"1");
    assert_eq!(answer(&domain, 2, 0, b"/local/domain/0/backend/vbd/4/1/state\0"), b"EACCES\0");
    let path = b"/local/domain/0/backend/vbd/3/1/state\x002";
    assert_eq!(answer(&domain, 11, 0, path), b"EACCES\0");
    // A driver domain sees the device that it serves.
    let driver = host.domain(DomainId(7));
    host.store_write("/local/domain/3/device/vbd/1/backend-id", "7");
    host.store_write("/local/domain/3/device/vbd/1/state", "4");
    assert_eq!(answer(&driver, 2, 0, b"/local/domain/3/device/vbd/1/state\0"), b"4");
    assert_eq!(answer(&driver, 2, 0, b"/local/domain/3/device/vbd/2/state\0"), b"EACCES\0");
}

#[test]
fn a_watch_fires_at_once_and_at_changes() {
    let (host, domain) = frontend();
    assert_eq!(answer(&domain, 4, 0, b"device\0mine\0"), b"OK\0");
    assert_eq!(message(&domain), (15, b"device\0mine\0".to_vec()));
    host.store_write("/local/domain/3/device/vbd/1/state", "5");
    assert_eq!(message(&domain), (15, b"device/vbd/1/state\0mine\0".to_vec()));
    assert_eq!(answer(&domain, 4, 0, b"device\0mine\0"), b"EEXIST\0");
    host.store_remove("/local/domain/3/device/vbd");
    assert_eq!(message(&domain), (15, b"device/vbd\0mine\0".to_vec()));
    assert_eq!(answer(&domain, 5, 0, b"device\0mine\0"), b"OK\0");
    assert_eq!(answer(&domain, 5, 0, b"device\0mine\0"), b"ENOENT\0");
}

#[test]
fn transactions_are_atomic_and_conflict() {
    let (host, domain) = frontend();
    let begin = || {
        let number = answer(&domain, 6, 0, b"\0");
        std::str::from_utf8(&number[..number.len() - 1]).unwrap().parse::<u32>().unwrap()
    };
    let first = begin();
    answer(&domain, 11, first, b"a\x001");
    assert_eq!(host.store_read("/local/domain/3/a"), None);
    assert_eq!(answer(&domain, 2, first, b"a\0"), b"1");
    assert_eq!(answer(&domain, 7, first, b"T\0"), b"OK\0");
    assert_eq!(host.store_read("/local/domain/3/a").as_deref(), Some("1"));

    let second = begin();
    answer(&domain, 2, second, b"a\0");
    answer(&domain, 11, second, b"b\x001");
    host.store_write("/local/domain/3/a", "2");
    assert_eq!(answer(&domain, 7, second, b"T\0"), b"EAGAIN\0");
    assert_eq!(host.store_read("/local/domain/3/b"), None);

    let third = begin();
    answer(&domain, 11, third, b"c\x001");
    assert_eq!(answer(&domain, 7, third, b"F\0"), b"OK\0");
    assert_eq!(host.store_read("/local/domain/3/c"), None);
    assert_eq!(answer(&domain, 7, third, b"T\0"), b"ENOENT\0");
}

#[test]
fn long_messages_pass_in_pieces_even_short_ones() {
    let (host, domain) = frontend();
    domain.set_faults(Faults {
        seed: 3,
        short_store_transfers: true,
        slow_store_one_in: 3,
        spurious_wakeup_one_in: 5,
        ..Faults::default()
    });
    let mut payload = b"long\0".to_vec();
    payload.extend(std::iter::repeat_n(b'x', 3000));
    assert_eq!(answer(&domain, 11, 0, &payload), b"OK\0");
    assert_eq!(answer(&domain, 2, 0, b"long\0"), payload[5..]);
    assert_eq!(host.store_read("/local/domain/3/long").unwrap().len(), 3000);
}

#[test]
fn a_ring_takes_no_more_than_it_holds() {
    let (_host, domain) = frontend();
    assert_eq!(domain.send(&[0; 2000]), Ok(1024));
    assert_eq!(domain.send(&[0; 2000]), Ok(0));
}

#[test]
fn an_oversized_message_breaks_the_connection() {
    let (_host, domain) = frontend();
    let mut bytes = [0xff; 16];
    bytes[0] = 2;
    domain.send(&bytes).unwrap();
    let mut answer = [0; 4];
    assert!(domain.receive(&mut answer).is_err());
    assert!(domain.send(&bytes).is_err());
}

#[test]
fn a_script_watches() {
    let (host, _domain) = frontend();
    let watch = host.store_watch("/local/domain/3/device");
    assert!(watch.take_changes());
    assert!(!watch.take_changes());
    host.store_write("/local/domain/3/device/x", "");
    assert_eq!(watch.next_change().as_deref(), Some("/local/domain/3/device/x"));
}
