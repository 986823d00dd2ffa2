//! The user half.
#![forbid(unsafe_code)]

pub mod allowlist;
pub mod datapath;
