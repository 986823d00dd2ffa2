//! The runtime's API, as the tests ask it: one call after the other, each within a bound.
//!
//! Its one job is to make calls that block out of calls that do not. What is asked for is built by
//! [`pod`](super::pod), in the words of version 1: those of the version before are the same on the wire,
//! and only the calls have other names.

use std::{
    future::Future,
    path::Path,
    task::{Context, Poll},
    time::Duration,
};

use k8s_cri::{
    v1::{
        self, image_service_client::ImageServiceClient,
        runtime_service_client::RuntimeServiceClient,
    },
    v1alpha2,
};
use tokio::runtime::Runtime;
use tonic::{
    Code, Response, Status,
    body::Body,
    codegen::{Service, http},
    transport::{self, Channel, Endpoint},
};

/// How long a call may take: on a busy machine a runtime starts half a dozen programs for one.
const PATIENCE: Duration = Duration::from_secs(60);

/// A version of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V1Alpha2,
}

/// A connection on which each call has the name that it has in one version.
#[derive(Clone, Debug)]
pub(super) struct Named {
    channel: Channel,
    version: Version,
}

/// A client of the runtime.
#[derive(Debug)]
pub(super) struct Cri {
    runtime: Runtime,
    channel: Channel,
    version: Version,
}

impl Cri {
    /// A client that speaks this version, connects when it is first asked, and again when the runtime
    /// was gone.
    pub(super) fn new(socket: &Path, version: Version) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads can be started");
        let channel = {
            let _entered = runtime.enter();
            Endpoint::from_shared(format!("unix://{}", socket.display()))
                .expect("a path is a place to connect to")
                .connect_lazy()
        };
        Self { runtime, channel, version }
    }

    fn named(&self) -> Named {
        Named { channel: self.channel.clone(), version: self.version }
    }

    /// Makes one call.
    pub(super) fn call<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, call)
                .await
                .unwrap_or_else(|_late| {
                    Err(Status::deadline_exceeded(format!("no answer within {PATIENCE:?}")))
                })
                .map(Response::into_inner)
        })
    }

    /// Calls on pods and containers.
    pub(super) fn service(&self) -> RuntimeServiceClient<Named> {
        RuntimeServiceClient::new(self.named())
    }

    /// Whether containers can be run, their network included.
    pub(super) fn is_ready(&self) -> Result<(), String> {
        let mut service = self.service();
        let answer = self.call(service.status(v1::StatusRequest::default()));
        let status = answer.map_err(|status| status.to_string())?.status.unwrap_or_default();
        match status.conditions.iter().find(|condition| !condition.status) {
            Some(missing) => Err(format!("{}: {}", missing.r#type, missing.message)),
            None => Ok(()),
        }
    }

    /// Whether it has an image of this name.
    pub(super) fn has_image(&self, name: &str) -> bool {
        let mut images = ImageServiceClient::new(self.named());
        let spec = v1::ImageSpec { image: name.to_owned(), ..Default::default() };
        let request = v1::ImageStatusRequest { image: Some(spec), verbose: false };
        self.call(images.image_status(request)).is_ok_and(|answer| answer.image.is_some())
    }

    /// What it says that it speaks, asked by the present version and by the one before; `None` where it
    /// does not know the one that it is asked by.
    pub(super) fn versions(&self) -> Result<[Option<String>; 2], Status> {
        let channel = || self.channel.clone();
        let mut present = RuntimeServiceClient::new(channel());
        let mut before = v1alpha2::runtime_service_client::RuntimeServiceClient::new(channel());
        let known = |answer: Result<String, Status>| match answer {
            Ok(version) => Ok(Some(version)),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(status),
        };
        Ok([
            known(
                self.call(present.version(v1::VersionRequest::default()))
                    .map(|answer| answer.runtime_api_version),
            )?,
            known(
                self.call(before.version(v1alpha2::VersionRequest::default()))
                    .map(|answer| answer.runtime_api_version),
            )?,
        ])
    }

    /// Stops and removes every pod; says which stay.
    pub(super) fn remove_all(&self) {
        let mut service = self.service();
        let list = match self.call(service.list_pod_sandbox(v1::ListPodSandboxRequest::default())) {
            Ok(list) => list.items,
            Err(status) => return eprintln!("pods may be left behind: {status}"),
        };
        for v1::PodSandbox { id: pod_sandbox_id, .. } in list {
            if let Err(status) = self.remove(pod_sandbox_id.clone()) {
                eprintln!("pod {pod_sandbox_id} is left behind: {status}");
            }
        }
    }

    /// Stops and removes a pod with all of its containers.
    pub(super) fn remove(&self, pod_sandbox_id: String) -> Result<(), Status> {
        let mut service = self.service();
        let stop = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        self.call(service.stop_pod_sandbox(stop))?;
        self.call(service.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }))?;
        Ok(())
    }
}

impl Service<http::Request<Body>> for Named {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = <Channel as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Service::poll_ready(&mut self.channel, context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        match self.version {
            Version::V1 => {}
            Version::V1Alpha2 => {
                let earlier =
                    request.uri().to_string().replace("/runtime.v1.", "/runtime.v1alpha2.");
                *request.uri_mut() = earlier.parse().expect("a name in place of another");
            }
        }
        Service::call(&mut self.channel, request)
    }
}
