//! What only a hostile backend does.

use pvblk_xen::platform::EventChannels;

use super::Core;
use super::config::Hostility;
use super::ring::Queue;

/// Values that no node should have.
const GARBAGE: [&str; 14] = [
    "",
    "0",
    "3",
    "-1",
    "511",
    "8191",
    "65536",
    "4294967295",
    "4294967296",
    "9223372036854775808",
    "36028797018963968",
    "18446744073709551616",
    "0x200",
    "\u{fffd}many",
];

impl Core {
    /// One of the configured hostilities, if it is time for one.
    pub(super) fn choose_hostility(&mut self) -> Option<Hostility> {
        if self.config.hostile.is_empty() || !self.random.one_in(self.config.hostile_one_in) {
            return None;
        }
        Some(self.config.hostile[self.random.index(self.config.hostile.len())])
    }

    /// What is done to a ring between answers.
    pub(super) fn harass_ring(&mut self, queue: &mut Queue) -> bool {
        let Some(hostility) = self.choose_hostility() else { return false };
        let random = self.random.number();
        match hostility {
            Hostility::InsaneProducer => {
                let ahead = queue.size + 1 + random as u32 % (u32::MAX / 2);
                queue.publish_producer(queue.responses_produced.wrapping_add(ahead));
                self.domain.notify(queue.port);
            }
            Hostility::ProducerBackwards => {
                let back = 1 + random as u32 % queue.size;
                queue.publish_producer(queue.responses_produced.wrapping_sub(back));
                self.domain.notify(queue.port);
            }
            Hostility::RewriteSlots => queue.spoil_response(&mut self.random),
            Hostility::RandomRequestEvent => queue.set_request_event(random as u32),
            Hostility::EventStorm => self.domain.notify(queue.port),
            _ => return false,
        }
        // Not progress: a frontend that hopes for an end of this must be found sleeping.
        false
    }

    /// What is done to XenStore between steps.
    pub(super) fn harass_store(&mut self) {
        match self.choose_hostility() {
            Some(Hostility::StateJumps) => {
                let state = self.random.below(11);
                let state = if state == 10 { "x".to_string() } else { state.to_string() };
                self.host.store_write(&format!("{}/state", self.path), state);
            }
            Some(Hostility::GarbageStore) => {
                let names = ["sectors", "sector-size", "info", "physical-sector-size"];
                let name = names[self.random.index(names.len())];
                let value = self.garbage();
                self.host.store_write(&format!("{}/{name}", self.path), value);
                // Looks like a change of size.
                self.host.store_write(&format!("{}/state", self.path), self.state.to_string());
            }
            _ => {}
        }
    }

    pub(super) fn garbage(&mut self) -> &'static str {
        GARBAGE[self.random.index(GARBAGE.len())]
    }
}
