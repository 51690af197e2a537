//! The handshake, as Linux's `xen-blkback/xenbus.c` goes about it.

use std::collections::{BTreeMap, BTreeSet};

use pvblk::memory::Access;
use pvblk_xen::platform::{EventChannels, GrantRef, Port};

use super::config::{CloseAt, Handshake, Hostility};
use super::layout::{Abi, REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use super::ring::Queue;
use super::{Core, Feature};
use crate::Vbd;

pub(super) const INITIALISING: u32 = 1;
pub(super) const INIT_WAIT: u32 = 2;
pub(super) const INITIALISED: u32 = 3;
pub(super) const CONNECTED: u32 = 4;
pub(super) const CLOSING: u32 = 5;
pub(super) const CLOSED: u32 = 6;

impl Core {
    /// What the toolstack writes when it adds a disk.
    pub(super) fn create_nodes(&self) {
        let mut vbd = Vbd::new(self.domain.id(), self.frontend, self.vdev);
        vbd.read_only = self.config.read_only;
        vbd.cdrom = self.config.cdrom;
        vbd.removable = self.config.removable;
        vbd.discard = Some(self.config.discard);
        vbd.trusted = self.config.trusted;
        vbd.online = self.config.online;
        self.host.attach_vbd(&vbd);
        // What the hotplug script says when the disk itself is there.
        self.host.store_write(&format!("{}/hotplug-status", self.path), "connected");
    }

    fn write_nodes(&self, nodes: &[(String, String)]) {
        let nodes: Vec<_> =
            nodes.iter().map(|(path, value)| (path.as_str(), value.as_bytes())).collect();
        self.host.store_write_all(&nodes);
    }

    pub(super) fn switch(&mut self, state: u32) {
        self.state = state;
        self.host.store_write(&format!("{}/state", self.path), state.to_string());
    }

    fn frontend_node(&self, name: &str) -> Option<String> {
        self.host.store_read(&format!("{}/{name}", self.frontend_path))
    }

    /// Follows the states. Says whether anything happened.
    pub(super) fn step_handshake(&mut self) -> bool {
        if self.state == INITIALISING && !self.probed {
            if self.host.now() < self.ready_at {
                self.host.set_timer(self.ready_at);
                return false;
            }
            self.probe();
            return true;
        }
        if std::mem::take(&mut self.close_soon) && self.state < CLOSING {
            self.switch(CLOSING);
            return true;
        }
        if !self.watch.take_changes() {
            return false;
        }
        let state = self.frontend_node("state").and_then(|state| state.parse().ok()).unwrap_or(0);
        match state {
            INITIALISING if self.state == CLOSED => self.probe(),
            INITIALISED | CONNECTED if self.state < CLOSING && self.queues.is_empty() => {
                self.attach(true);
            }
            CLOSING if self.state < CLOSING => self.switch(CLOSING),
            CLOSED => {
                self.detach();
                if self.state != CLOSED {
                    self.switch(CLOSED);
                }
                if !self.config.online {
                    self.alive = false;
                }
            }
            0 if self.frontend_node("backend").is_none() => {
                self.detach();
                self.alive = false;
            }
            _ => {}
        }
        true
    }

    /// Publishes the limits.
    pub(super) fn probe(&mut self) {
        self.probed = true;
        if self.config.close_at == Some(CloseAt::InitWait) {
            self.switch(CLOSING);
            return;
        }
        let limits = [
            ("feature-max-indirect-segments", self.config.max_indirect_segments),
            ("max-ring-page-order", self.config.max_ring_page_order),
            ("multi-queue-max-queues", self.config.max_queues),
        ];
        let limits =
            limits.into_iter().filter_map(|(name, value)| Some((name, value?.to_string())));
        let limits: Vec<_> = limits.collect();
        self.publish_nodes(&limits);
        match self.config.handshake {
            Handshake::Nominal => self.switch(INIT_WAIT),
            Handshake::StraightToInitialised => self.switch(INITIALISED),
            Handshake::StraightToConnected => {
                self.publish_properties();
                self.switch(CONNECTED);
            }
        }
    }

    /// Publishes what is known only when the rings are connected.
    fn publish_properties(&mut self) {
        let digit = |flag: bool| if flag { "1" } else { "0" }.to_string();
        let config = &self.config;
        let info = u32::from(config.cdrom)
            | u32::from(config.removable) << 1
            | u32::from(config.read_only) << 2;
        let mut nodes = vec![
            ("feature-flush-cache", digit(self.can(Feature::Flush))),
            ("feature-barrier", digit(self.can(Feature::Barrier))),
        ];
        if self.can(Feature::Discard) {
            nodes.push(("discard-granularity", config.discard_granularity.to_string()));
            nodes.push(("discard-alignment", config.discard_alignment.to_string()));
            nodes.push(("discard-secure", digit(config.discard_secure)));
            nodes.push(("feature-discard", digit(true)));
        }
        nodes.push(("feature-persistent", digit(config.persistent)));
        nodes.push(("sectors", config.sectors.to_string()));
        nodes.push(("info", info.to_string()));
        nodes.push(("sector-size", config.sector_size.to_string()));
        nodes.push(("physical-sector-size", config.physical_sector_size.to_string()));
        self.publish_nodes(&nodes);
    }

    /// Writes nodes of the backend's directory, as the configuration distorts them.
    fn publish_nodes(&mut self, nodes: &[(&str, String)]) {
        let garbage = self.config.is_hostile(Hostility::GarbageStore);
        let mut written = Vec::new();
        for (name, value) in nodes {
            let path = format!("{}/{name}", self.path);
            let other = self.config.overrides.iter().find(|(other, _)| other == name);
            match other {
                Some((_, Some(other))) => written.push((path, other.clone())),
                Some((_, None)) => {}
                None if garbage && self.random.one_in(3) => {
                    written.push((path, self.garbage().to_string()));
                }
                None => written.push((path, value.clone())),
            }
        }
        self.write_nodes(&written);
    }

    /// Removes what an earlier backend published.
    pub(super) fn unpublish(&self) {
        for name in [
            "feature-max-indirect-segments",
            "max-ring-page-order",
            "multi-queue-max-queues",
            "feature-flush-cache",
            "feature-barrier",
            "feature-discard",
            "discard-granularity",
            "discard-alignment",
            "discard-secure",
            "feature-persistent",
            "sectors",
            "info",
            "sector-size",
            "physical-sector-size",
        ] {
            self.host.store_remove(&format!("{}/{name}", self.path));
        }
    }

    fn can(&self, feature: Feature) -> bool {
        self.offers(feature) && !self.revoked.contains(&feature)
    }

    /// Connects to the rings that the frontend published.
    fn attach(&mut self, fresh: bool) {
        if self.config.close_at == Some(CloseAt::Published) {
            self.config.close_at = None;
            self.switch(CLOSING);
            return;
        }
        match self.connect_rings(fresh) {
            Ok(queues) => {
                self.queues = queues;
                self.statistics.connects += 1;
                if self.state != CONNECTED {
                    self.publish_properties();
                    self.switch(CONNECTED);
                }
                if self.config.close_at == Some(CloseAt::Connected) {
                    self.config.close_at = None;
                    self.close_soon = true;
                }
            }
            Err(why) => {
                self.violation(format!("the frontend's rings are refused: {why}"));
                let home = format!("/local/domain/{}", self.domain.id().0);
                let device = self.path.strip_prefix(&home).unwrap_or(&self.path);
                self.host.store_write(&format!("{home}/error{device}/error"), why);
                self.switch(CLOSING);
            }
        }
    }

    fn connect_rings(&mut self, fresh: bool) -> Result<Vec<Queue>, String> {
        let abi = match self.frontend_node("protocol") {
            Some(protocol) => Abi::from_protocol(&protocol)
                .ok_or_else(|| format!("unknown protocol {protocol:?}"))?,
            None => {
                self.violation("the frontend names no protocol".into());
                self.config.missing_protocol
            }
        };
        let persistent = self.frontend_node("feature-persistent").as_deref() == Some("1");
        self.persistent = persistent && self.config.persistent;
        let queues = self.frontend_number("multi-queue-num-queues", self.config.max_queues)?;
        if queues == Some(0) {
            return Err("no queue at all".into());
        }
        let order = self.frontend_number("ring-page-order", self.config.max_ring_page_order)?;
        let queues = queues.unwrap_or(1);
        let mut connected = Vec::new();
        let mut frames = BTreeSet::new();
        for index in 0..queues {
            let directory = match queues {
                1 => String::new(),
                _ => format!("queue-{index}/"),
            };
            // Dropped with the rest when a later one fails.
            let result = self.connect_ring(index as usize, &directory, abi, order, &mut frames);
            match result {
                Ok(queue) => connected.push(queue),
                Err(why) => {
                    for queue in connected {
                        self.domain.close(queue.port);
                    }
                    return Err(why);
                }
            }
        }
        for queue in &connected {
            self.check_ring(queue, fresh);
        }
        Ok(connected)
    }

    /// A number that may be missing, and may be at most what was advertised.
    fn frontend_number(&mut self, name: &str, limit: Option<u32>) -> Result<Option<u32>, String> {
        let Some(text) = self.frontend_node(name) else { return Ok(None) };
        let Some(limit) = limit else {
            // An old backend does not know the node.
            self.violation(format!("{name} is {text:?}, but the backend offers nothing such"));
            return Ok(None);
        };
        let number: u32 = text.parse().map_err(|_| format!("{name} is {text:?}"))?;
        if number > limit {
            return Err(format!("{name} is {number}, the limit is {limit}"));
        }
        Ok(Some(number))
    }

    fn connect_ring(
        &mut self,
        index: usize,
        directory: &str,
        abi: Abi,
        order: Option<u32>,
        frames: &mut BTreeSet<usize>,
    ) -> Result<Queue, String> {
        let number = |name: &str| {
            let text = self.frontend_node(&format!("{directory}{name}"));
            let text = text.ok_or_else(|| format!("{directory}{name} is missing"))?;
            text.parse::<u32>().map_err(|_| format!("{directory}{name} is {text:?}"))
        };
        let names: Vec<_> = match order {
            // Chosen by the presence of the order, even of zero.
            Some(order) => (0..1 << order).map(|page| format!("ring-ref{page}")).collect(),
            None => vec!["ring-ref".to_string()],
        };
        let mut pages = Vec::new();
        for name in &names {
            let reference = GrantRef(number(name)?);
            let page = self
                .domain
                .map_page(self.frontend, reference, Access::ReadWrite)
                .map_err(|error| format!("{directory}{name}: {error}"))?;
            if !frames.insert(page.frame()) {
                return Err(format!("{directory}{name} names a ring page that is in use"));
            }
            pages.push(page);
        }
        let remote = Port(number("event-channel")?);
        let size = abi.slots(pages.len());
        let producer = pages[0].load_u32(RSP_PROD, std::sync::atomic::Ordering::Acquire);
        let requests = pages[0].load_u32(REQ_PROD, std::sync::atomic::Ordering::Acquire);
        if requests.wrapping_sub(producer) > size {
            return Err(format!("{requests} requests and {producer} answers in {size} slots"));
        }
        let port = self
            .domain
            .bind_interdomain(self.frontend, remote)
            .map_err(|error| format!("{directory}event-channel: {error}"))?;
        self.domain.unmask(port);
        Ok(Queue {
            index,
            pages,
            abi,
            size,
            port,
            // A backend that comes back attaches where its predecessor's answers end.
            requests_consumed: producer,
            responses_produced: producer,
            responses_published: producer,
            pending: Vec::new(),
            persistent: BTreeMap::new(),
            awake: true,
            first_event: true,
            dead: false,
            old_ids: Vec::new(),
        })
    }

    /// A new ring must be initialised as `SHARED_RING_INIT` does, at whatever index it starts.
    fn check_ring(&mut self, queue: &Queue, fresh: bool) {
        let next = queue.load(RSP_PROD).wrapping_add(1);
        let events = (queue.load(REQ_EVENT), queue.load(RSP_EVENT));
        if fresh && queue.load(REQ_PROD) == queue.load(RSP_PROD) && events != (next, next) {
            let index = queue.index;
            self.violation(format!("ring {index} starts with the events {events:?}, not {next}"));
        }
    }

    /// Unmaps the rings and everything else. Requests that are not answered never will be.
    pub(super) fn detach(&mut self) {
        for mut queue in std::mem::take(&mut self.queues) {
            for pending in std::mem::take(&mut queue.pending) {
                self.let_go(&mut queue, pending);
            }
            for (_, kept) in std::mem::take(&mut queue.persistent) {
                self.unmap(Some(kept.mapping));
            }
            self.domain.close(queue.port);
            for page in queue.pages {
                self.unmap(Some(page));
            }
        }
    }

    /// Connects again to rings that are in use.
    pub(super) fn attach_again(&mut self) {
        self.attach(false);
    }

    /// Publishes a new size, as a change of the state that is none.
    pub(super) fn publish_size(&mut self) {
        let nodes = [
            (format!("{}/sectors", self.path), self.config.sectors.to_string()),
            (format!("{}/state", self.path), self.state.to_string()),
        ];
        self.write_nodes(&nodes);
    }
}
