//! The OpenAPI document, made from the table of routes and the wire types.

use serde_json::{Value, json};
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, PathsBuilder,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ComponentsBuilder, Ref, Schema};
use utoipa::openapi::{InfoBuilder, OpenApiBuilder, RefOr, Required, ResponseBuilder};
use utoipa::{PartialSchema, ToSchema};

use super::caller::Role;
use super::route::{Access, Method, Route};
use super::types::{
    Announced, Announcement, Confine, Confined, Diagnostics, ExplainRequest, Explanation,
    GrantView, LastDenial, Problem, Refreshed, Revoke, Status, WorkloadView,
};

/// The document, as JSON.
#[must_use]
pub fn openapi() -> Value {
    let mut schemas: Vec<(String, RefOr<Schema>)> = Vec::new();
    let mut paths = PathsBuilder::new();
    for route in Route::ALL {
        let (request, response) = bodies(route, &mut schemas);
        let mut operation = OperationBuilder::new()
            .operation_id(Some(route.as_str()))
            .summary(Some(route.summary()))
            .description(Some(who_may(route)));
        for parameter in parameters(route) {
            operation = operation.parameter(parameter);
        }
        if let Some(body) = request {
            let content = ContentBuilder::new().schema(Some(body)).build();
            let body = RequestBodyBuilder::new()
                .content("application/json", content)
                .required(Some(Required::True))
                .build();
            operation = operation.request_body(Some(body));
        }
        let mut success = ResponseBuilder::new().description("Done");
        if let Some((media, body)) = response {
            success = success.content(media, ContentBuilder::new().schema(Some(body)).build());
        }
        let problem = ResponseBuilder::new()
            .description("Not done; says why and what helps")
            .content(
                "application/problem+json",
                ContentBuilder::new().schema(Some(named::<Problem>(&mut schemas))).build(),
            )
            .build();
        operation = operation
            .response(route.success().to_string(), success.build())
            .response("default", problem);
        let method = match route.method() {
            Method::Get => HttpMethod::Get,
            Method::Post => HttpMethod::Post,
            Method::Put => HttpMethod::Put,
        };
        let item = utoipa::openapi::PathItem::new(method, operation.build());
        paths = paths.path(route.path(), item);
    }
    let components = ComponentsBuilder::new().schemas_from_iter(schemas).build();
    let info = InfoBuilder::new()
        .title("agentguard control API")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "HTTP with JSON on a unix socket. The caller is known by the credentials of its \
             connection: root may do everything, another user may confine itself and see what is \
             its own, a process of a workload may do nothing.",
        ))
        .build();
    let document =
        OpenApiBuilder::new().info(info).paths(paths.build()).components(Some(components)).build();
    serde_json::to_value(document).unwrap_or_else(|error| json!({"error": error.to_string()}))
}

fn who_may(route: Route) -> &'static str {
    match route.access(Role::User) {
        Access::Everything => "For root and other users.",
        Access::Own => "For root; for another user as far as it goes for what is its own.",
        Access::Denied => "For root only.",
    }
}

type Response = (&'static str, RefOr<Schema>);

/// The bodies of the request and of a success.
fn bodies(
    route: Route,
    schemas: &mut Vec<(String, RefOr<Schema>)>,
) -> (Option<RefOr<Schema>>, Option<Response>) {
    const JSON: &str = "application/json";
    match route {
        Route::Status => (None, Some((JSON, named::<Status>(schemas)))),
        Route::Workloads => (None, Some((JSON, list::<WorkloadView>(schemas)))),
        Route::Workload => (None, Some((JSON, named::<WorkloadView>(schemas)))),
        Route::Grants => (None, Some((JSON, list::<GrantView>(schemas)))),
        Route::Grant => (None, Some((JSON, named::<GrantView>(schemas)))),
        // The manifest has a schema of its own, as the custom resource has it.
        Route::AddGrant => (Some(any_object()), Some((JSON, named::<GrantView>(schemas)))),
        Route::RevokeGrant => {
            (Some(named::<Revoke>(schemas)), Some((JSON, named::<GrantView>(schemas))))
        }
        Route::Explain => {
            (Some(named::<ExplainRequest>(schemas)), Some((JSON, named::<Explanation>(schemas))))
        }
        Route::ExplainLast => (None, Some((JSON, named::<LastDenial>(schemas)))),
        Route::Confine => {
            (Some(named::<Confine>(schemas)), Some((JSON, named::<Confined>(schemas))))
        }
        Route::Announce => {
            (Some(named::<Announcement>(schemas)), Some((JSON, named::<Announced>(schemas))))
        }
        Route::Events => (None, Some(("application/x-ndjson", any_object()))),
        Route::Diagnostics => (Some(named::<Diagnostics>(schemas)), None),
        Route::RefreshExecutables => (None, Some((JSON, named::<Refreshed>(schemas)))),
        Route::OpenApi => (None, Some((JSON, any_object()))),
    }
}

fn parameters(route: Route) -> Vec<Parameter> {
    match route {
        Route::Workload => vec![in_path("workload")],
        Route::Grant | Route::RevokeGrant => vec![in_path("grant")],
        Route::ExplainLast => vec![in_query("workload", String::schema())],
        Route::Events => vec![
            in_query("follow", bool::schema()),
            in_query("denied", bool::schema()),
            in_query("workload", String::schema()),
            in_query("limit", u32::schema()),
        ],
        Route::Status
        | Route::Workloads
        | Route::Grants
        | Route::AddGrant
        | Route::Explain
        | Route::Confine
        | Route::Announce
        | Route::Diagnostics
        | Route::RefreshExecutables
        | Route::OpenApi => Vec::new(),
    }
}

fn in_path(name: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .schema(Some(String::schema()))
        .build()
}

fn in_query(name: &str, schema: RefOr<Schema>) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Query)
        .required(Required::False)
        .schema(Some(schema))
        .build()
}

/// A reference to the type's schema, which is added with all that it refers to.
fn named<T: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) -> RefOr<Schema> {
    let name = T::name();
    schemas.push((name.to_string(), T::schema()));
    T::schemas(schemas);
    RefOr::Ref(Ref::from_schema_name(name))
}

fn list<T: ToSchema>(schemas: &mut Vec<(String, RefOr<Schema>)>) -> RefOr<Schema> {
    utoipa::openapi::ArrayBuilder::new().items(named::<T>(schemas)).into()
}

fn any_object() -> RefOr<Schema> {
    utoipa::openapi::ObjectBuilder::new().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_covers_every_route_and_nothing_else() {
        let document = openapi();
        let paths = document["paths"].as_object().unwrap();
        let documented: usize = paths.values().map(|item| item.as_object().unwrap().len()).sum();
        assert_eq!(documented, Route::ALL.len());
        for route in Route::ALL {
            let method = route.method().as_str().to_lowercase();
            let operation = &paths[route.path()][&method];
            assert_eq!(operation["operationId"], route.as_str());
            assert!(operation["responses"][route.success().to_string()].is_object());
        }
    }

    #[test]
    fn every_reference_leads_to_a_schema() {
        fn references(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(map) => {
                    for (key, value) in map {
                        if let ("$ref", Value::String(to)) = (key.as_str(), value) {
                            found.push(to.clone());
                        }
                        references(value, found);
                    }
                }
                Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        let document = openapi();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20);
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }
}
