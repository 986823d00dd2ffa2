//! The user half.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
