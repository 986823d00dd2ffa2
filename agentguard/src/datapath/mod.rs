//! The kernel half as seen from user space.

pub mod fake;
