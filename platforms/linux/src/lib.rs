//! The Xen platform traits of `pvblk-xen` in a Linux process, over `/dev/xen`.

