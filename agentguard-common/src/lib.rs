//! The vocabulary both halves of agentguard share.
#![no_std]

pub mod mode;
pub mod protocol;

pub use mode::Mode;
pub use protocol::Protocol;
