//! What a block backend serves from: memory, files, NBD servers, other disks.
#![no_std]

