//! The console: the ring of the PV console (`io/console.h`), which `xl console` shows.
//!
//! Output waits for the console daemon if the ring is full. Before the ring is there, and in a
//! domain that has none, output goes to the hypervisor's debug port instead, which Xen's own log
//! shows.

use core::fmt;

use pvh_guest::sync::Locked;
use xen_hypercalls::event_channel::Port;
use xen_hypercalls::sched;

use crate::byte_ring::ByteRing;
use crate::{clock, debug_port, events};

/// Bytes of the ring for output.
const RING_BYTES: u32 = 2048;
// Offsets in `struct xencons_interface`.
const OUTPUT: usize = 1024;
const OUTPUT_CONSUMER: usize = 3080;
const OUTPUT_PRODUCER: usize = 3084;

/// How long a program that ends waits for its last output to be read, in nanoseconds.
const FLUSH_NANOSECONDS: u64 = 2_000_000_000;
/// How long one sleep for the daemon takes at most.
const NAP_NANOSECONDS: u64 = 20_000_000;

struct Ring {
    output: ByteRing,
    port: Port,
}

static RING: Locked<Option<Ring>> = Locked::new(None);

/// Starts to use the page shared with the console daemon.
///
/// # Safety
///
/// `page` is that page, mapped for good, and nobody else uses it. `port` stays masked.
#[cfg(target_os = "none")]
pub(crate) unsafe fn start(page: *mut u8, port: Port) {
    // SAFETY: the layout is the header's; the page is the caller's promise.
    let output =
        unsafe { ByteRing::new(page, OUTPUT, RING_BYTES, OUTPUT_CONSUMER, OUTPUT_PRODUCER) };
    RING.with(|ring| *ring = Some(Ring { output, port }));
}

/// Writes bytes as they are, and tells the console daemon.
///
/// Waits while the ring is full. It does not matter whether interrupts are on: the wait is for this
/// one port.
pub fn write(bytes: &[u8]) {
    let mut out = Writer { signal: None };
    out.put(bytes);
}

/// Writes formatted text; what `print!` and `println!` use.
#[doc(hidden)]
pub fn print(text: fmt::Arguments<'_>) {
    let mut out = Writer { signal: None };
    // The writer takes everything; an error could only come from a `Display` of the caller.
    let _ = fmt::Write::write_fmt(&mut out, text);
}

/// Waits until the console daemon has read everything, but not for ever.
pub(crate) fn flush() {
    let give_up = clock::now() + FLUSH_NANOSECONDS;
    while clock::now() < give_up {
        let state = RING.try_with(|ring| {
            let ring = ring.as_ref()?;
            // Cleared before the ring is looked at: a later signal ends the sleep at once.
            events::clear_pending(ring.port);
            Some((ring.output.used(), ring.port))
        });
        let Some(Some((Ok(1..), port))) = state else { return };
        nap(port);
    }
}

/// Writes to the console; its daemon is told once, when the writer is dropped.
struct Writer {
    signal: Option<Port>,
}

impl Writer {
    fn put(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let step = RING.try_with(|ring| {
                let ring = ring.as_mut()?;
                events::clear_pending(ring.port);
                Some((ring.output.write(rest).ok()?, ring.port))
            });
            // No ring, a broken ring, or one that this very code was using when it failed.
            let Some(Some((written, port))) = step else { return debug_port::write(rest) };
            rest = &rest[written..];
            self.signal = Some(port);
            if !rest.is_empty() {
                self.tell();
                nap(port);
            }
        }
    }

    fn tell(&mut self) {
        if let Some(port) = self.signal.take() {
            events::notify(port);
        }
    }
}

impl fmt::Write for Writer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes());
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.tell();
    }
}

/// Sleeps until the (masked) port is signalled, for a while.
fn nap(port: Port) {
    // A refusal only makes this a busy wait.
    let _ = sched::poll(&[port], clock::now() + NAP_NANOSECONDS);
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {
        $crate::console::print(::core::format_args!($($argument)*))
    };
}

/// Prints to the console, and a newline.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($format:literal $($argument:tt)*) => {
        $crate::print!("{}\n", ::core::format_args!($format $($argument)*))
    };
}
