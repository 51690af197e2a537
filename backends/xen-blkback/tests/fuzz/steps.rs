//! What a frontend, a toolstack and the owner of a vbd may do, in any order.

use pvblk_simulated::Script;

/// One of those things.
#[derive(Clone, Debug)]
pub enum Step {
    WriteFront(&'static str, Vec<u8>),
    WriteBack(&'static str, Vec<u8>),
    RemoveFront(&'static str),
    RemoveBack(&'static str),
    FrontState(u8),
    BackState(u8),
    /// Rings that are there: which, how many, and the state that goes with it.
    Publish(usize, usize, &'static str),
    Detach,
    RemoveGuest,
    RemoveDevice,
    Create,
    /// Look, and do what is asked for.
    Obey,
    /// Look, and say that the queues cannot be opened.
    Refuse,
    /// Look, and take one's time.
    Look,
    Connected,
    Disconnected,
    Insert,
    Resize(u64),
    Revoke,
    Close,
}

const FRONT_NODES: [&str; 12] = [
    "state",
    "protocol",
    "feature-persistent",
    "multi-queue-num-queues",
    "ring-page-order",
    "ring-ref",
    "ring-ref0",
    "ring-ref1",
    "event-channel",
    "queue-0/ring-ref",
    "queue-1/event-channel",
    "backend-id",
];

const BACK_NODES: [&str; 10] = [
    "state",
    "online",
    "mode",
    "hotplug-status",
    "frontend",
    "frontend-id",
    "multi-queue-max-queues",
    "max-ring-page-order",
    "feature-max-indirect-segments",
    "feature-persistent",
];

const VALUES: [&str; 25] = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
    "16",
    "32",
    "64",
    "65",
    "4294967295",
    "4294967296",
    "-1",
    "",
    "connected",
    "error",
    "x86_64-abi",
    "x86_32-abi",
    "w",
    "r",
    "a/b",
];

/// The usual, a number of something that exists, or any bytes.
fn value(script: &mut Script, numbers: &[u32]) -> Vec<u8> {
    match script.byte() {
        choice @ 0..160 => VALUES[usize::from(choice) % VALUES.len()].into(),
        choice @ 160..224 => numbers[usize::from(choice) % numbers.len()].to_string().into(),
        224..252 => script.some(40),
        _ => vec![b'9'; 2000],
    }
}

impl Step {
    /// The next one. `numbers` are those of grants and event channels of the guest.
    pub fn next(script: &mut Script, numbers: &[u32]) -> Self {
        let front = |script: &mut Script| FRONT_NODES[script.below(FRONT_NODES.len())];
        let back = |script: &mut Script| BACK_NODES[script.below(BACK_NODES.len())];
        match script.byte() % 62 {
            0..16 => Self::Obey,
            16..22 => {
                let count = 1 + script.below(2);
                let first = script.below(3 - count);
                Self::Publish(first, count, ["3", "4"][script.below(2)])
            }
            22..28 => Self::WriteFront(front(script), value(script, numbers)),
            28..36 => Self::FrontState(script.byte() % 9),
            36..40 => Self::Look,
            40..42 => Self::Connected,
            42..44 => Self::Disconnected,
            44..46 => Self::WriteBack(back(script), value(script, numbers)),
            46..48 => Self::RemoveFront(front(script)),
            48..50 => Self::Create,
            50..52 => Self::Insert,
            52..54 => Self::Refuse,
            54 => Self::RemoveBack(back(script)),
            55 => Self::BackState(script.byte() % 9),
            56 => Self::Detach,
            57 => Self::RemoveGuest,
            58 => Self::RemoveDevice,
            59 => Self::Resize(script.byte().into()),
            60 => Self::Revoke,
            _ => Self::Close,
        }
    }
}
