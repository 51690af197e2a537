//! Why a message of the monitor is not done.

use std::io;

use vhost::vhost_user::Error;

/// Why a message of the monitor is not done. The connection is closed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("SET_FEATURES: {0:#x} was not offered")]
    Features(u64),
    #[error("SET_PROTOCOL_FEATURES: {0:#x} was not offered")]
    ProtocolFeatures(u64),
    #[error("there is no queue {0}: the device has {1} queues")]
    Queue(usize, usize),
    #[error("SET_VRING_NUM: queue {0} cannot have {1} descriptors: 1 to {2} are offered")]
    Size(u32, u32, u16),
    #[error("queue {0}: its parts are not in the memory that the monitor shares")]
    Address(usize),
    #[error("queue {0} cannot be stopped: the store that it waits for does not return")]
    Stuck(usize),
    #[error("SET_VRING_KICK: queue {0} would have to be polled, which is not offered")]
    NoKick(u8),
    #[error("SET_CONFIG: only the byte at {0} can be written, the write cache")]
    Config(u32),
    #[error("REM_MEM_REG: there is no such region of memory")]
    Region,
    #[error("GET_INFLIGHT_FD: {0} queues of {1} descriptors: up to {2} of {3} are offered")]
    Inflight(u16, u16, usize, u16),
    #[error("SET_INFLIGHT_FD: a log of {0} queues of {1} descriptors does not fit into {2} bytes")]
    Log(u16, u16, u64),
    #[error("it belongs to a feature that is not offered")]
    Unsupported,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(io::Error::other(refusal))
    }
}
