//! The console: the first serial port.

use core::fmt;

use crate::serial;

/// Writes bytes as they are.
pub fn write(bytes: &[u8]) {
    serial::write(bytes);
}

/// Writes formatted text; what `print!` and `println!` use.
#[doc(hidden)]
pub fn print(text: fmt::Arguments<'_>) {
    // The writer takes everything; an error could only come from a `Display` of the caller.
    let _ = fmt::Write::write_fmt(&mut Writer, text);
}

struct Writer;

impl fmt::Write for Writer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        serial::write(text.as_bytes());
        Ok(())
    }
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
