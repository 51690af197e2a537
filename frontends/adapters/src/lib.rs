//! A paravirtual disk as the block traits of other projects
#![no_std]
