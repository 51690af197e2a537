//! Event channels (`xen/include/public/event_channel.h`).

use std::fmt::Write as _;
use std::task::Waker;

use pvblk_xen::platform::{DomainId, EventError, Port};

use crate::host::State;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Binding {
    Unbound { peer: DomainId },
    Interdomain { peer: DomainId, remote: Port },
}

struct Channel {
    binding: Binding,
    /// A signal came while the port was masked.
    pending: bool,
    masked: bool,
    /// Delivered, not yet taken.
    delivered: bool,
    waker: Option<Waker>,
}

pub(crate) struct EventState {
    /// Port 0 is never valid.
    channels: Vec<Option<Channel>>,
    pub(crate) limit: usize,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) merged: u64,
}

impl EventState {
    pub(crate) fn new() -> Self {
        Self { channels: vec![None], limit: 4095, sent: 0, received: 0, merged: 0 }
    }

    pub(crate) fn open(&self) -> usize {
        self.channels.iter().flatten().count()
    }

    pub(crate) fn open_ports(&self) -> Vec<Port> {
        let ports = self.channels.iter().enumerate();
        ports
            .filter(|(_, channel)| channel.is_some())
            .map(|(index, _)| Port(index as u32))
            .collect()
    }

    fn get(&mut self, port: Port) -> Option<&mut Channel> {
        self.channels.get_mut(port.0 as usize)?.as_mut()
    }

    fn insert(&mut self, channel: Channel) -> Result<Port, EventError> {
        if self.open() >= self.limit {
            return Err(EventError::Exhausted);
        }
        // Xen gives out the lowest free port.
        let free = self.channels.iter().skip(1).position(Option::is_none);
        let index = match free {
            Some(index) => index + 1,
            None => {
                self.channels.push(None);
                self.channels.len() - 1
            }
        };
        self.channels[index] = Some(channel);
        Ok(Port(index as u32))
    }

    pub(crate) fn take(&mut self, port: Port) -> bool {
        self.get(port).is_some_and(|channel| std::mem::take(&mut channel.delivered))
    }

    pub(crate) fn set_waker(&mut self, port: Port, waker: &Waker) {
        if let Some(channel) = self.get(port) {
            channel.waker = Some(waker.clone());
        }
    }

    pub(crate) fn dump(&self, text: &mut String) {
        for (port, channel) in self.channels.iter().enumerate() {
            if let Some(channel) = channel {
                let _ = writeln!(
                    text,
                    "  port {port}: {:?}, masked {}, pending {}, delivered and not taken {}",
                    channel.binding, channel.masked, channel.pending, channel.delivered
                );
            }
        }
    }
}

impl State {
    pub(crate) fn allocate_unbound(
        &mut self,
        id: DomainId,
        peer: DomainId,
    ) -> Result<Port, EventError> {
        let domain = self.domain(id);
        if domain.faults.refuse_event_channel() {
            return Err(EventError::Exhausted);
        }
        domain.events.insert(Channel {
            binding: Binding::Unbound { peer },
            pending: false,
            masked: true,
            delivered: false,
            waker: None,
        })
    }

    pub(crate) fn bind_interdomain(
        &mut self,
        id: DomainId,
        peer: DomainId,
        remote: Port,
    ) -> Result<Port, EventError> {
        if self.domain(id).faults.refuse_event_channel() {
            return Err(EventError::Refused);
        }
        let other = self.domains.get_mut(&peer).ok_or(EventError::Refused)?;
        let other = other.events.get(remote).ok_or(EventError::Refused)?;
        if other.binding != (Binding::Unbound { peer: id }) {
            return Err(EventError::Refused);
        }
        let local = self.domain(id).events.insert(Channel {
            binding: Binding::Interdomain { peer, remote },
            // A signal may have come before there was anybody to bind: Xen signals the new port.
            pending: true,
            masked: true,
            delivered: false,
            waker: None,
        })?;
        if let Some(other) = self.domain(peer).events.get(remote) {
            other.binding = Binding::Interdomain { peer: id, remote: local };
        }
        Ok(local)
    }

    pub(crate) fn close_port(&mut self, id: DomainId, port: Port) {
        let channels = &mut self.domain(id).events.channels;
        let Some(channel) = channels.get_mut(port.0 as usize).and_then(Option::take) else {
            panic!("{id:?} closes {port:?}, which is not open: closed twice?")
        };
        // The other end waits for a new binding, as in Xen.
        if let Binding::Interdomain { peer, remote } = channel.binding
            && let Some(other) = self.domains.get_mut(&peer)
            && let Some(other) = other.events.get(remote)
        {
            other.binding = Binding::Unbound { peer: id };
        }
    }

    pub(crate) fn notify(&mut self, id: DomainId, port: Port) {
        let domain = self.domain(id);
        let Some(channel) = domain.events.get(port) else {
            panic!("{id:?} signals {port:?}, which is not open")
        };
        let binding = channel.binding;
        domain.events.sent += 1;
        let twice = domain.faults.random.one_in(domain.faults.faults.spurious_event_one_in);
        // Xen drops a signal on a port that is not bound yet.
        if let Binding::Interdomain { peer, remote } = binding {
            self.signal_port(peer, remote);
            if twice {
                self.signal_port(peer, remote);
            }
        }
    }

    fn signal_port(&mut self, id: DomainId, port: Port) {
        let Some(domain) = self.domains.get_mut(&id) else { return };
        let Some(channel) = domain.events.get(port) else { return };
        if channel.masked {
            let merged = std::mem::replace(&mut channel.pending, true);
            domain.events.merged += u64::from(merged);
        } else {
            self.deliver(id, port);
        }
    }

    fn deliver(&mut self, id: DomainId, port: Port) {
        let domain = self.domain(id);
        let Some(channel) = domain.events.get(port) else { return };
        channel.pending = false;
        channel.masked = true;
        channel.delivered = true;
        let waker = channel.waker.take();
        domain.events.received += 1;
        domain.fresh = true;
        self.wakers.extend(waker);
        self.signal = true;
    }

    pub(crate) fn unmask(&mut self, id: DomainId, port: Port) {
        let Some(channel) = self.domain(id).events.get(port) else {
            panic!("{id:?} unmasks {port:?}, which is not open")
        };
        channel.masked = false;
        if channel.pending {
            self.deliver(id, port);
        }
    }
}

#[cfg(test)]
mod tests {
    use pvblk_xen::platform::EventChannels;

    use super::*;
    use crate::{Domain, Host};

    fn pair() -> (Domain, Port, Domain, Port) {
        let host = Host::new(1);
        let (front, back) = (host.domain(DomainId(1)), host.domain(DomainId(0)));
        let far = front.allocate_unbound(DomainId(0)).unwrap();
        let near = back.bind_interdomain(DomainId(1), far).unwrap();
        (front, far, back, near)
    }

    #[test]
    fn a_signal_waits_for_the_unmasking_and_is_merged() {
        let (front, far, back, near) = pair();
        back.notify(near);
        back.notify(near);
        assert!(!front.take(far));
        front.unmask(far);
        assert!(front.take(far));
        assert!(!front.take(far));
        back.notify(near);
        assert!(!front.take(far), "masked since the delivery");
        front.unmask(far);
        assert!(front.take(far));
        assert_eq!(front.statistics().events_received, 2);
        assert_eq!(front.statistics().events_merged, 1);
    }

    #[test]
    fn a_new_binding_is_signalled_once_and_only_for_the_right_domain() {
        let (front, far, back, near) = pair();
        back.unmask(near);
        assert!(back.take(near));
        assert_eq!(back.bind_interdomain(DomainId(1), far), Err(EventError::Refused));
        back.close(near);
        front.notify(far);
        let again = back.bind_interdomain(DomainId(1), far).unwrap();
        back.unmask(again);
        assert!(back.take(again));
    }
}
