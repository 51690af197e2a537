//! Feature bits.

bitflags::bitflags! {
    /// What a device offers and a driver accepts.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// `VIRTIO_BLK_F_SIZE_MAX`: a segment has a greatest size.
        const SIZE_MAX = 1 << 1;
        /// `VIRTIO_BLK_F_SEG_MAX`: a request has a greatest number of segments.
        const SEG_MAX = 1 << 2;
        /// `VIRTIO_BLK_F_GEOMETRY`: cylinders, heads and sectors.
        const GEOMETRY = 1 << 4;
        /// `VIRTIO_BLK_F_RO`: the disk is read-only.
        const READ_ONLY = 1 << 5;
        /// `VIRTIO_BLK_F_BLK_SIZE`: the disk states its logical sector.
        const BLOCK_SIZE = 1 << 6;
        /// `VIRTIO_BLK_F_FLUSH`: there is a command to flush the write cache.
        const FLUSH = 1 << 9;
        /// `VIRTIO_BLK_F_TOPOLOGY`: the disk states its physical sector and its best sizes.
        const TOPOLOGY = 1 << 10;
        /// `VIRTIO_BLK_F_CONFIG_WCE`: the write cache can be switched.
        const CONFIG_WCE = 1 << 11;
        /// `VIRTIO_BLK_F_MQ`: there may be several queues.
        const MULTI_QUEUE = 1 << 12;
        /// `VIRTIO_BLK_F_DISCARD`.
        const DISCARD = 1 << 13;
        /// `VIRTIO_BLK_F_WRITE_ZEROES`.
        const WRITE_ZEROES = 1 << 14;
        /// `VIRTIO_BLK_F_LIFETIME`: the disk says how worn it is.
        const LIFETIME = 1 << 15;
        /// `VIRTIO_BLK_F_SECURE_ERASE`.
        const SECURE_ERASE = 1 << 16;
        /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may name a table of descriptors.
        const INDIRECT = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX`: each side says at which index it wants to be notified.
        const EVENT_INDEX = 1 << 29;
        /// `VIRTIO_F_VERSION_1`: the device is not a legacy one.
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_ACCESS_PLATFORM`: addresses are what the platform's DMA API gives.
        const ACCESS_PLATFORM = 1 << 33;
        /// `VIRTIO_F_RING_PACKED`: packed queues.
        const PACKED = 1 << 34;
        /// `VIRTIO_F_IN_ORDER`: requests are answered in the order in which they came.
        const IN_ORDER = 1 << 35;
        /// `VIRTIO_F_ORDER_PLATFORM`: memory is ordered as for a device of the machine.
        const ORDER_PLATFORM = 1 << 36;
        /// `VIRTIO_F_NOTIFICATION_DATA`: notifications say how far the queue is.
        const NOTIFICATION_DATA = 1 << 38;
        /// `VIRTIO_F_RING_RESET`: one queue can be reset.
        const RING_RESET = 1 << 40;
        // Bits without a name here are kept as they are.
        const _ = !0;
    }
}
