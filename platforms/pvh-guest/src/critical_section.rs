//! Critical sections for the `critical-section` crate: on the one vCPU, interrupts off.

use critical_section::RawRestoreState;

use crate::interrupts;

struct InterruptsOff;

critical_section::set_impl!(InterruptsOff);

// SAFETY: with interrupts off nothing else runs on the one vCPU; sections nest, as each gives back
// the state that it found.
unsafe impl critical_section::Impl for InterruptsOff {
    unsafe fn acquire() -> RawRestoreState {
        interrupts::disable()
    }

    unsafe fn release(were_on: RawRestoreState) {
        if were_on {
            interrupts::enable();
        }
    }
}
