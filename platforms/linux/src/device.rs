//! Opening a device, and calling its driver.

use std::io;
use std::os::fd::OwnedFd;

use core::ffi::c_void;
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Direction, Ioctl, IoctlOutput, Opcode, opcode};

use crate::error::{Device, OpenError};

/// Opens a device; nothing that is done with it blocks.
pub(crate) fn open(device: Device) -> Result<OwnedFd, OpenError> {
    open_with(device, OFlags::NONBLOCK)
}

/// Opens a device whose reads block.
pub(crate) fn open_blocking(device: Device) -> Result<OwnedFd, OpenError> {
    open_with(device, OFlags::empty())
}

fn open_with(device: Device, more: OFlags) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | more;
    rustix::fs::open(device.path(), flags, Mode::empty())
        .map_err(|errno| OpenError::new(device, io::Error::from(errno)))
}

/// An argument of a driver's call, of the layout that the driver expects.
///
/// # Safety
///
/// The type is `repr(C)`, without references. It is what the driver of group
/// [`GROUP`](Self::GROUP) takes, by address, for the call of number [`NUMBER`](Self::NUMBER) and
/// size [`BYTES`](Self::BYTES). The
/// driver writes to nothing but to it, which it leaves a valid value, and to what it points to,
/// for which whoever makes the call vouches.
pub(crate) unsafe trait Argument {
    /// The driver's letter.
    const GROUP: u8;
    /// The call's number.
    const NUMBER: u8;
    /// What the call's number says of the argument's size, which may end in a list.
    const BYTES: usize;
}

/// A call, ready to be made. Its output is what the call returned.
pub(crate) struct Call<'a, T>(pub(crate) &'a mut T);

// SAFETY: the argument lives for the call, and `Argument` promises what the driver does with it.
// Xen's drivers number their calls without a direction (`_IOC_NONE`) but with a size.
unsafe impl<T: Argument> Ioctl for Call<'_, T> {
    type Output = u32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::from_components(Direction::None, T::GROUP, T::NUMBER, T::BYTES)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut *self.0).cast()
    }

    unsafe fn output_from_ptr(returned: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        Ok(returned.cast_unsigned())
    }
}
