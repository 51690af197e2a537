//! What a platform adds: its console, its interrupts, its end.

use core::fmt;

use crate::StartInfo;

/// The first interrupt vector of the platform: the first after the processor's own.
pub const FIRST_VECTOR: u8 = 32;
/// How many vectors the platform has.
pub const VECTORS: u8 = 32;

/// The part of an image that the platform knows how to do. Named once an image, by
/// [`runtime!`](crate::runtime).
pub trait Runtime {
    /// The first thing that runs: on the one stack, with interrupts off, exceptions handled, and the
    /// first 4 GiB mapped to themselves.
    fn start(info: StartInfo) -> !;

    /// An interrupt came: `vector` is one of the [`VECTORS`] from [`FIRST_VECTOR`] on. Interrupts are off.
    fn interrupt(vector: u8);

    /// Writes bytes to the console as they are.
    fn write(bytes: &[u8]);

    /// Writes text to the console. It may come at any time, even from inside of itself.
    fn print(text: fmt::Arguments<'_>);

    /// Waits until the console has taken what was written, but not for ever.
    fn flush();

    /// Nanoseconds of a clock that does not go back.
    fn now() -> u64;

    /// Ends the guest as one that failed.
    fn crash() -> !;
}

/// Makes a type's [`Runtime`] that of the image.
#[macro_export]
macro_rules! runtime {
    ($runtime:ty) => {
        const _: () = {
            use $crate::Runtime as _;

            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_start(info: $crate::StartInfo) -> ! {
                <$runtime>::start(info)
            }
            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_interrupt(vector: u8) {
                <$runtime>::interrupt(vector)
            }
            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_write(bytes: &[u8]) {
                <$runtime>::write(bytes)
            }
            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_print(text: ::core::fmt::Arguments<'_>) {
                <$runtime>::print(text)
            }
            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_flush() {
                <$runtime>::flush()
            }
            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_now() -> u64 {
                <$runtime>::now()
            }
            #[unsafe(no_mangle)]
            extern "Rust" fn pvh_guest_crash() -> ! {
                <$runtime>::crash()
            }
        };
    };
}

#[cfg(target_os = "none")]
mod image {
    use core::fmt;

    use crate::StartInfo;

    unsafe extern "Rust" {
        safe fn pvh_guest_start(info: StartInfo) -> !;
        safe fn pvh_guest_interrupt(vector: u8);
        #[cfg(feature = "defmt")]
        safe fn pvh_guest_write(bytes: &[u8]);
        safe fn pvh_guest_print(text: fmt::Arguments<'_>);
        #[cfg(feature = "defmt")]
        safe fn pvh_guest_flush();
        #[cfg(feature = "log")]
        safe fn pvh_guest_now() -> u64;
        safe fn pvh_guest_crash() -> !;
    }

    pub(crate) fn start(info: StartInfo) -> ! {
        pvh_guest_start(info)
    }

    pub(crate) fn interrupt(vector: u8) {
        pvh_guest_interrupt(vector);
    }

    #[cfg(feature = "defmt")]
    pub(crate) fn write(bytes: &[u8]) {
        pvh_guest_write(bytes);
    }

    pub(crate) fn print(text: fmt::Arguments<'_>) {
        pvh_guest_print(text);
    }

    #[cfg(feature = "defmt")]
    pub(crate) fn flush() {
        pvh_guest_flush();
    }

    #[cfg(feature = "log")]
    pub(crate) fn now() -> u64 {
        pvh_guest_now()
    }

    pub(crate) fn crash() -> ! {
        pvh_guest_crash()
    }
}

#[cfg(target_os = "none")]
pub(crate) use image::*;
