//! Instruction counts of the engines, beside their peers
#![no_std]
