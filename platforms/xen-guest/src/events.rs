//! Event channels: two-level ABI, one vCPU, "late EOI".
//!
//! The upcall masks each pending port, clears it and marks it delivered, and wakes its waker; no
//! work is done in the interrupt. The driver takes the mark, does its work and unmasks. So a peer
//! that signals without end costs one upcall a round of work.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use core::task::Waker;

use pvh_guest::interrupts;
use pvh_guest::sync::{Locked, without_interrupts};
use xen_hypercalls::event_channel as op;
use xen_hypercalls::shared_info::SharedInfo;
use xen_hypercalls::{Errno, vcpu};

use crate::clock;

/// Ports that can be used. Xen gives the lowest that is free, so this is a limit on how many are
/// open at a time; the ABI has 4096.
pub(crate) const MAX_PORTS: usize = 1024;

struct PortState {
    /// Delivered, and not taken yet.
    delivered: AtomicBool,
    /// Belongs to this runtime (XenStore, timer): a delivery ends one sleep, nobody takes it.
    internal: AtomicBool,
    received: AtomicU64,
    sent: AtomicU64,
}

static PORTS: [PortState; MAX_PORTS] = [const {
    PortState {
        delivered: AtomicBool::new(false),
        internal: AtomicBool::new(false),
        received: AtomicU64::new(0),
        sent: AtomicU64::new(0),
    }
}; MAX_PORTS];

static WAKERS: Locked<[Option<Waker>; MAX_PORTS]> = Locked::new([const { None }; MAX_PORTS]);
static SHARED: AtomicPtr<SharedInfo> = AtomicPtr::new(ptr::null_mut());
/// Whether anything was delivered since the last sleep ended.
static DELIVERED: AtomicBool = AtomicBool::new(false);
/// Upcalls since the start.
static UPCALLS: AtomicU64 = AtomicU64::new(0);

/// The port of the timer, or 0 (which Xen never gives out).
static TIMER_PORT: AtomicU32 = AtomicU32::new(0);
/// The system time that the timer is set to; [`UNSET`] if it is not set.
static TIMER_DEADLINE: AtomicU64 = AtomicU64::new(UNSET);
const UNSET: u64 = u64::MAX;

/// The shared page, once it is mapped.
pub(crate) fn shared_info() -> Option<&'static SharedInfo> {
    let shared = SHARED.load(Ordering::Relaxed);
    // SAFETY: null, or the page that `start` was given, which stays mapped; all fields are atomics.
    unsafe { shared.as_ref() }
}

/// Masks every port, and starts to use the shared page.
///
/// # Safety
///
/// `shared` is the page that Xen shares with this domain, mapped for good.
#[cfg(target_os = "none")]
pub(crate) unsafe fn start(shared: *mut SharedInfo) {
    SHARED.store(shared, Ordering::Relaxed);
    if let Some(shared) = shared_info() {
        for word in &shared.evtchn_mask {
            word.store(u64::MAX, Ordering::SeqCst);
        }
    }
}

/// Binds the timer. Called once, when upcalls can come.
#[cfg(target_os = "none")]
pub(crate) fn start_timer() -> Result<(), Errno> {
    let port = op::bind_virq(op::VIRQ_TIMER, 0)?;
    make_internal(port);
    TIMER_PORT.store(port, Ordering::Relaxed);
    unmask(port);
    Ok(())
}

/// Says that this runtime itself listens to the port.
#[cfg(target_os = "none")]
pub(crate) fn make_internal(port: op::Port) {
    if let Some(state) = PORTS.get(port as usize) {
        state.internal.store(true, Ordering::Relaxed);
    }
}

/// The interrupt: takes what is pending and not masked.
#[cfg(target_os = "none")]
pub(crate) fn upcall() {
    UPCALLS.fetch_add(1, Ordering::Relaxed);
    let Some(shared) = shared_info() else { return };
    let vcpu = &shared.vcpu_info[0];
    // Cleared before the ports are looked at: an event that comes later sets it again, and the
    // interrupt follows this one.
    while vcpu.evtchn_upcall_pending.swap(0, Ordering::SeqCst) != 0 {
        let mut words = vcpu.evtchn_pending_sel.swap(0, Ordering::SeqCst);
        while words != 0 {
            let index = words.trailing_zeros() as usize;
            words &= words - 1;
            let mut bits = shared.evtchn_pending[index].load(Ordering::SeqCst)
                & !shared.evtchn_mask[index].load(Ordering::SeqCst);
            while bits != 0 {
                deliver(shared, (index * 64) as u32 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
    }
}

/// The word and the bit of a port.
fn place(port: op::Port) -> (usize, u64) {
    (port as usize / 64 % 64, 1 << (port % 64))
}

/// Masks the port, and marks it delivered if it was pending. Interrupts are off.
fn deliver(shared: &SharedInfo, port: op::Port) {
    let (word, bit) = place(port);
    // The timer is Xen's own and comes once a setting: it needs no holding off.
    let is_timer = port == TIMER_PORT.load(Ordering::Relaxed);
    if !is_timer {
        shared.evtchn_mask[word].fetch_or(bit, Ordering::SeqCst);
    }
    if shared.evtchn_pending[word].fetch_and(!bit, Ordering::SeqCst) & bit == 0 {
        return;
    }
    if is_timer {
        // Xen has timers come up to 50 us early (`timer_slop`): the time that it was set to may be one
        // that is still to come, and it does not come again then.
        TIMER_DEADLINE.store(UNSET, Ordering::Relaxed);
    }
    let Some(state) = PORTS.get(port as usize) else { return };
    state.received.fetch_add(1, Ordering::Relaxed);
    if !state.internal.load(Ordering::Relaxed) {
        state.delivered.store(true, Ordering::Relaxed);
    }
    DELIVERED.store(true, Ordering::Relaxed);
    // Taken out first: what a waker does may set the next one.
    if let Some(waker) = WAKERS.with(|wakers| wakers[port as usize].take()) {
        waker.wake();
    }
}

/// Lets the next event of the port in; one that came meanwhile is delivered at once.
///
/// Xen sets the pending bit and then looks at the mask; here the mask is cleared and then the
/// pending bit is looked at, each in one locked step. So an event is seen by one of the two, and if
/// by both, the upcall finds the pending bit cleared. No hypercall is needed.
pub(crate) fn unmask(port: op::Port) {
    let Some(shared) = shared_info() else { return };
    let (word, bit) = place(port);
    without_interrupts(|| {
        shared.evtchn_mask[word].fetch_and(!bit, Ordering::SeqCst);
        if shared.evtchn_pending[word].load(Ordering::SeqCst) & bit != 0 {
            deliver(shared, port);
        }
    });
}

/// Takes the mark that the port was delivered.
pub(crate) fn take(port: op::Port) -> bool {
    let Some(state) = PORTS.get(port as usize) else { return false };
    // Looked at first: drivers ask far more often than events come.
    state.delivered.load(Ordering::Relaxed) && state.delivered.swap(false, Ordering::Relaxed)
}

/// Clears the port's pending bit without delivering it. For ports that stay masked and are polled.
pub(crate) fn clear_pending(port: op::Port) {
    if let Some(shared) = shared_info() {
        let (word, bit) = place(port);
        shared.evtchn_pending[word].fetch_and(!bit, Ordering::SeqCst);
    }
}

/// Signals the other end of the port.
#[inline]
pub(crate) fn notify(port: op::Port) {
    if let Some(state) = PORTS.get(port as usize) {
        state.sent.fetch_add(1, Ordering::Relaxed);
    }
    // A port whose other end has gone is no error to the caller: it learns that from XenStore.
    let _ = op::send(port);
}

/// Takes note of a new port, which is masked, or closes it again if it is out of range.
pub(crate) fn adopt(port: op::Port) -> Result<op::Port, Errno> {
    let Some(state) = PORTS.get(port as usize) else {
        let _ = op::close(port);
        return Err(Errno::NOSPC);
    };
    state.received.store(0, Ordering::Relaxed);
    state.sent.store(0, Ordering::Relaxed);
    Ok(port)
}

/// Closes the port. Nothing is delivered for it afterwards.
pub(crate) fn close(port: op::Port) {
    let (word, bit) = place(port);
    if let Some(shared) = shared_info() {
        shared.evtchn_mask[word].fetch_or(bit, Ordering::SeqCst);
    }
    // It may be closed already, by the other end's death.
    let _ = op::close(port);
    clear_pending(port);
    take(port);
    if (port as usize) < MAX_PORTS {
        drop(WAKERS.with(|wakers| wakers[port as usize].take()));
    }
}

/// Has the waker woken at the port's next delivery. A port that is delivered already wakes it now.
pub(crate) fn set_waker(port: op::Port, waker: &Waker) {
    let Some(state) = PORTS.get(port as usize) else { return };
    let waker = waker.clone();
    let replaced = WAKERS.with(|wakers| wakers[port as usize].replace(waker));
    drop(replaced);
    if state.delivered.load(Ordering::Relaxed)
        && let Some(waker) = WAKERS.with(|wakers| wakers[port as usize].take())
    {
        waker.wake();
    }
}

/// Sleeps until a port was delivered since the last sleep ended, `more` says true, or the deadline
/// (system time, nanoseconds) is there; or for less.
///
/// Everything is looked at with interrupts off, and they are switched on by the instruction before
/// the one that sleeps: no event is missed in between. Interrupts are on afterwards.
pub(crate) fn wait(deadline: Option<u64>, more: impl Fn() -> bool) {
    interrupts::disable();
    let awake = DELIVERED.load(Ordering::Relaxed)
        || more()
        || deadline.is_some_and(|deadline| !set_timer(deadline));
    if awake {
        interrupts::enable();
    } else {
        interrupts::enable_and_halt();
    }
    // The caller looks at everything after this: what came until now must not end the next sleep.
    DELIVERED.store(false, Ordering::Relaxed);
}

/// Sees that the timer comes at the deadline or earlier; `false` if the deadline is past.
///
/// A timer that is set to an earlier time is left alone: the sleep then ends early, once. So waits
/// whose deadlines move on with every request cost no hypercall each.
fn set_timer(deadline: u64) -> bool {
    let now = clock::now();
    if deadline <= now {
        return false;
    }
    let set_to = TIMER_DEADLINE.load(Ordering::Relaxed);
    if set_to <= deadline && set_to > now {
        return true;
    }
    TIMER_DEADLINE.store(deadline, Ordering::Relaxed);
    vcpu::set_singleshot_timer(0, deadline).is_ok()
}

/// (upcalls, events received, notifications sent) of all ports.
pub(crate) fn totals() -> (u64, u64, u64) {
    let sum = |count: fn(&PortState) -> &AtomicU64| {
        PORTS.iter().map(|port| count(port).load(Ordering::Relaxed)).sum()
    };
    (UPCALLS.load(Ordering::Relaxed), sum(|port| &port.received), sum(|port| &port.sent))
}

/// (events received, notifications sent) of a port.
pub(crate) fn counts(port: op::Port) -> (u64, u64) {
    PORTS.get(port as usize).map_or((0, 0), |state| {
        (state.received.load(Ordering::Relaxed), state.sent.load(Ordering::Relaxed))
    })
}

#[cfg(test)]
mod tests {
    use core::mem::MaybeUninit;

    use super::*;

    /// A timer that came is not waited for once more, however early it came.
    #[test]
    fn a_timer_comes_once_a_setting() {
        // SAFETY: it is made of numbers.
        let shared: SharedInfo = unsafe { MaybeUninit::zeroed().assume_init() };
        let port = 70;
        let (word, bit) = place(port);
        TIMER_PORT.store(port, Ordering::Relaxed);
        TIMER_DEADLINE.store(1_000_000, Ordering::Relaxed);
        deliver(&shared, port);
        assert_eq!(TIMER_DEADLINE.load(Ordering::Relaxed), 1_000_000, "it did not come");
        shared.evtchn_pending[word].store(bit, Ordering::Relaxed);
        deliver(&shared, port);
        assert_eq!(TIMER_DEADLINE.load(Ordering::Relaxed), UNSET);
        assert_eq!(shared.evtchn_mask[word].load(Ordering::Relaxed), 0);
    }
}
