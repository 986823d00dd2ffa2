//! The routes, and who may take them.
//!
//! The one place where it is decided what a role may do. The server and the OpenAPI document are
//! both made from this table, so a route without an answer to "who may?" does not compile.

use super::caller::Role;

/// A verb of the control API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    Status,
    Workloads,
    Workload,
    Grants,
    Grant,
    AddGrant,
    RevokeGrant,
    Explain,
    ExplainLast,
    Confine,
    Announce,
    Events,
    Diagnostics,
    RefreshExecutables,
    OpenApi,
}

/// HTTP methods in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    Get,
    Post,
    Put,
}

impl Method {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
        }
    }
}

/// How far a role may take a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Everything,
    /// As far as the caller itself and what is its own go.
    Own,
    Denied,
}

impl Route {
    pub const ALL: [Self; 15] = [
        Self::Status,
        Self::Workloads,
        Self::Workload,
        Self::Grants,
        Self::Grant,
        Self::AddGrant,
        Self::RevokeGrant,
        Self::Explain,
        Self::ExplainLast,
        Self::Confine,
        Self::Announce,
        Self::Events,
        Self::Diagnostics,
        Self::RefreshExecutables,
        Self::OpenApi,
    ];

    #[must_use]
    pub const fn method(self) -> Method {
        match self {
            Self::Status
            | Self::Workloads
            | Self::Workload
            | Self::Grants
            | Self::Grant
            | Self::ExplainLast
            | Self::Events
            | Self::OpenApi => Method::Get,
            Self::AddGrant
            | Self::RevokeGrant
            | Self::Explain
            | Self::Confine
            | Self::Announce
            | Self::RefreshExecutables => Method::Post,
            Self::Diagnostics => Method::Put,
        }
    }

    /// The path, with parameters in braces.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::Workloads => "/v1/workloads",
            Self::Workload => "/v1/workloads/{workload}",
            Self::Grants | Self::AddGrant => "/v1/grants",
            Self::Grant => "/v1/grants/{grant}",
            Self::RevokeGrant => "/v1/grants/{grant}/revoke",
            Self::Explain => "/v1/explain",
            Self::ExplainLast => "/v1/explain/last",
            Self::Confine => "/v1/confine",
            Self::Announce => "/v1/containers",
            Self::Events => "/v1/events",
            Self::Diagnostics => "/v1/diagnostics",
            Self::RefreshExecutables => "/v1/executables/refresh",
            Self::OpenApi => "/v1/openapi.json",
        }
    }

    /// The word used in metrics and as the operation's id.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Workloads => "list_workloads",
            Self::Workload => "get_workload",
            Self::Grants => "list_grants",
            Self::Grant => "get_grant",
            Self::AddGrant => "add_grant",
            Self::RevokeGrant => "revoke_grant",
            Self::Explain => "explain",
            Self::ExplainLast => "explain_last_denial",
            Self::Confine => "confine",
            Self::Announce => "announce_container",
            Self::Events => "events",
            Self::Diagnostics => "set_diagnostics",
            Self::RefreshExecutables => "refresh_executables",
            Self::OpenApi => "openapi",
        }
    }

    /// What it does, as one line.
    #[must_use]
    pub const fn summary(self) -> &'static str {
        match self {
            Self::Status => "The state of the daemon and what this kernel can enforce",
            Self::Workloads => "The workloads on this node",
            Self::Workload => "One workload, by name, SPIFFE ID or cgroup",
            Self::Grants => "The grants, in every state",
            Self::Grant => "One grant",
            Self::AddGrant => "Add a grant, given as its manifest",
            Self::RevokeGrant => "Take a grant back",
            Self::Explain => "What would happen to a request of a workload, and why",
            Self::ExplainLast => "Why the last denied request was denied",
            Self::Confine => "Make the calling process a workload",
            Self::Announce => "Hold a container before its first instruction",
            Self::Events => "Records as JSON lines: the newest, or a stream",
            Self::Diagnostics => "Turn the datapath's own diagnostics on or off",
            Self::RefreshExecutables => "Look for the granted executables again",
            Self::OpenApi => "This document",
        }
    }

    /// The status of a success.
    #[must_use]
    pub const fn success(self) -> u16 {
        match self {
            Self::AddGrant => 201,
            Self::Diagnostics => 204,
            Self::Status
            | Self::Workloads
            | Self::Workload
            | Self::Grants
            | Self::Grant
            | Self::RevokeGrant
            | Self::Explain
            | Self::ExplainLast
            | Self::Confine
            | Self::Announce
            | Self::Events
            | Self::RefreshExecutables
            | Self::OpenApi => 200,
        }
    }

    /// Who may.
    #[must_use]
    pub const fn access(self, role: Role) -> Access {
        match role {
            Role::Root => Access::Everything,
            Role::Workload | Role::Foreign => Access::Denied,
            Role::User => match self {
                Self::OpenApi => Access::Everything,
                Self::Status
                | Self::Workloads
                | Self::Workload
                | Self::Grants
                | Self::Grant
                | Self::Explain
                | Self::ExplainLast
                | Self::Confine
                | Self::Events => Access::Own,
                Self::AddGrant
                | Self::Announce
                | Self::RevokeGrant
                | Self::Diagnostics
                | Self::RefreshExecutables => Access::Denied,
            },
        }
    }
}
