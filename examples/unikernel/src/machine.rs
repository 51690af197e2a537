//! What the program needs of its machine beside a disk.

use core::fmt;

/// A machine: a Xen guest, or one in QEMU without Xen.
pub trait Machine {
    /// The value of `key=value` in the command line.
    fn argument(&self, key: &str) -> Option<&'static str>;

    /// Nanoseconds of a clock that does not go back.
    fn now(&self) -> u64;

    /// Sleeps until an interrupt came since the last sleep ended; or for less.
    fn wait(&self);

    /// Prints to the console.
    fn print(&self, text: fmt::Arguments<'_>);
}

/// Prints a line to a machine's console.
macro_rules! say {
    ($machine:expr, $format:literal $($argument:tt)*) => {
        $machine.print(::core::format_args!(
            "{}\n", ::core::format_args!($format $($argument)*)
        ))
    };
}

pub(crate) use say;
