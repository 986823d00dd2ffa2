//! The user half.

pub mod audit;
pub mod metrics;
