//! The control API: HTTP with JSON on a unix socket, and metrics and health on a TCP address.
//!
//! Its one job is to let the right callers reach the verbs of [`service::Service`]. It must not
//! know how a verb is carried out. Who may do what is decided in one place, [`route`]; who a caller
//! is, in [`caller`]. Everything is safe to call from many tasks at once.

pub mod caller;
pub mod client;
pub mod openapi;
pub mod remedy;
pub mod route;
pub mod server;
pub mod service;
pub mod ttl;
pub mod types;
