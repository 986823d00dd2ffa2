//! The user half.

pub mod audit;
pub mod config;
pub mod logging;
pub mod metrics;
