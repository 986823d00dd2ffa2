//! Container runtimes: what each says of this node's pods and containers.
//!
//! An edge: turns what a runtime answers into the plain values of [`crate::identity::container`].
//! Knows no workload, grant or tag.

use std::collections::BTreeMap;
use std::future::Future;

use crate::identity::container::{Container, Sandbox};

/// What a runtime says there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// By their ids.
    pub sandboxes: BTreeMap<String, Sandbox>,
    /// Those that have a process, by their ids.
    pub containers: BTreeMap<String, Container>,
}

/// Why a runtime did not answer. What it said before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the container runtime at {endpoint} {what}; {remedy}")]
pub struct RuntimeError {
    pub endpoint: String,
    pub what: String,
    pub remedy: &'static str,
}

/// A container runtime.
pub trait Runtime: Send + 'static {
    /// Where it is asked, as logs and `status` name it.
    fn endpoint(&self) -> &str;

    /// All that there is at this moment.
    fn list(&mut self) -> impl Future<Output = Result<Listing, RuntimeError>> + Send;

    /// Waits until something may have changed. Returns at once where that is not known, after a
    /// short while where the runtime does not tell.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}
