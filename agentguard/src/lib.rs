//! The user half.
#![deny(unsafe_code)]

pub mod allowlist;
pub mod api;
pub mod audit;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod fault;
pub mod grant;
pub mod identity;
pub mod kubernetes;
pub mod logging;
pub mod manifest;
pub mod metrics;
pub mod name;
pub mod pattern;
pub mod reconcile;
pub mod retry;
pub mod runtimes;
pub mod scope;
