//! The hypervisor's errors.

use core::fmt;

/// An error of a hypercall (`errno.h`), as a positive number.
///
/// The numbers are Xen's own; they happen to be Linux's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u16);

macro_rules! errors {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        impl Errno {
            $(
                #[doc = concat!("`E", stringify!($name), "`: ", $text, ".")]
                pub const $name: Self = Self($number);
            )*

            /// The name in `errno.h`, or `None` if the number is not there.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(concat!("E", stringify!($name))),)*
                    _ => None,
                }
            }

            const fn text(self) -> &'static str {
                match self.0 {
                    $($number => $text,)*
                    _ => "unknown error",
                }
            }
        }
    };
}

errors! {
    PERM = 1, "the operation is not permitted";
    NOENT = 2, "no such entry";
    SRCH = 3, "no such domain or vCPU";
    IO = 5, "input or output failed";
    NXIO = 6, "no such device or address";
    TOOBIG = 7, "the argument list is too long (`E2BIG`)";
    NOEXEC = 8, "the format cannot be executed";
    BADF = 9, "bad file number";
    CHILD = 10, "no child process";
    AGAIN = 11, "not now, try again";
    NOMEM = 12, "out of memory";
    ACCES = 13, "permission denied";
    FAULT = 14, "bad address";
    BUSY = 16, "in use";
    EXIST = 17, "exists already";
    XDEV = 18, "a link between devices";
    NODEV = 19, "no such device";
    NOTDIR = 20, "not a directory";
    ISDIR = 21, "a directory";
    INVAL = 22, "invalid argument";
    NFILE = 23, "a table of the system is full";
    MFILE = 24, "too many open files";
    NOSPC = 28, "no space left";
    ROFS = 30, "read-only";
    MLINK = 31, "too many links";
    DOM = 33, "an argument is outside the function's domain";
    RANGE = 34, "out of range";
    DEADLK = 35, "this would be a deadlock";
    NAMETOOLONG = 36, "the name is too long";
    NOLCK = 37, "no lock available";
    NOSYS = 38, "not implemented";
    NOTEMPTY = 39, "not empty";
    NODATA = 61, "no data";
    TIME = 62, "the time has passed";
    BADMSG = 74, "not a data message";
    OVERFLOW = 75, "the value does not fit";
    ILSEQ = 84, "illegal byte sequence";
    NOTSOCK = 88, "not a socket";
    MSGSIZE = 90, "the message is too large";
    OPNOTSUPP = 95, "not supported";
    ADDRINUSE = 98, "the address is in use";
    ADDRNOTAVAIL = 99, "the address cannot be had";
    NOBUFS = 105, "no buffer space";
    ISCONN = 106, "connected already";
    NOTCONN = 107, "not connected";
    TIMEDOUT = 110, "timed out";
    CONNREFUSED = 111, "connection refused";
}

impl Errno {
    /// From the negative word of a hypercall. A word that is no error number at all (the hypervisor
    /// makes none) saturates.
    pub(crate) const fn from_negative(word: isize) -> Self {
        let number = word.unsigned_abs();
        Self(if number > u16::MAX as usize { u16::MAX } else { number as u16 })
    }

    /// The number, positive, as in `errno.h`.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (Xen error {})", self.text(), self.0)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl core::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::Errno;
    use crate::raw::result;

    #[test]
    fn a_negative_word_is_an_error_with_a_name() {
        assert_eq!(result(-22), Err(Errno::INVAL));
        assert_eq!(Errno::INVAL.name(), Some("EINVAL"));
        assert_eq!(result(0), Ok(0));
        assert_eq!(result(0x0004_0011), Ok(0x0004_0011));
    }

    #[test]
    fn a_number_without_a_name_stays_itself() {
        assert_eq!(result(-4000).unwrap_err().number(), 4000);
        assert_eq!(result(isize::MIN).unwrap_err().name(), None);
    }
}
