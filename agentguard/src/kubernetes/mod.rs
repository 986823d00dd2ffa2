//! The Kubernetes API server, and what is watched there.
//!
//! The only module that knows `kube` and `k8s-openapi`: what comes out are plain values. Everything
//! here goes on with what it last knew while the API server can not be reached, and asks again with
//! growing pauses of random length. What is kept of each object is little, and how much is kept of each
//! kind of objects has a bound (`kubernetes.max_kind_bytes`).

pub mod events;
mod filled;
pub mod manifests;
pub mod pods;
pub mod resources;
pub mod services;
pub mod status;
#[cfg(test)]
mod tests;
pub mod watch;

use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::config::value::KubernetesAccess;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(5);
/// How long the API server may send nothing; longer than a watch lasts.
const SILENCE: Duration = Duration::from_secs(watch::WATCH_SECONDS as u64 + 15);

/// The API server can not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error(
        "this is no pod with a service account: {0}; set kubernetes.access to the path of a kubeconfig, or to off"
    )]
    NotInCluster(#[from] kube::config::InClusterError),
    #[error("{path} is no kubeconfig that can be used: {source}; set kubernetes.access")]
    Kubeconfig { path: String, source: kube::config::KubeconfigError },
    #[error("the API server can not be asked: {0}")]
    Client(#[from] kube::Error),
}

/// A client for the configured API server; `None` where there is to be none. Makes no request yet.
///
/// # Errors
///
/// When what is configured can not be used.
pub async fn connect(access: &KubernetesAccess) -> Result<Option<Client>, AccessError> {
    let mut config = match access {
        KubernetesAccess::Off => return Ok(None),
        KubernetesAccess::InCluster => Config::incluster()?,
        KubernetesAccess::Kubeconfig(path) => {
            let named = |source| AccessError::Kubeconfig { path: path.to_string(), source };
            let file = Kubeconfig::read_from(path.as_ref()).map_err(named)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(named)?
        }
    };
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    Ok(Some(Client::try_from(config)?))
}
