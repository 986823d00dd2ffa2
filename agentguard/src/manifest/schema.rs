//! JSON Schemas of the manifests, for editors and for API servers.
//!
//! Generated from the types in [`super::wire`]. They say less than the reader, which also knows
//! addresses, paths and time windows: what the reader accepts they accept, not the reverse.

use schemars::{
    JsonSchema, Schema,
    generate::SchemaSettings,
    transform::{RecursiveTransform, Transform},
};
use serde_json::Value;

use super::wire::{ClusterGrantManifest, GrantManifest, ScopeManifest, WorkloadManifest};

/// The schema of each kind, by the name of the file that holds it in `deploy/schemas`.
#[must_use]
pub fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("scope.schema.json", schema_of::<ScopeManifest>("Scope")),
        ("grant.schema.json", schema_of::<GrantManifest>("Grant")),
        ("clustergrant.schema.json", schema_of::<ClusterGrantManifest>("ClusterGrant")),
        ("workload.schema.json", schema_of::<WorkloadManifest>("Workload")),
    ]
}

fn schema_of<T: JsonSchema>(title: &str) -> Value {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<T>();
    RecursiveTransform(forbid_null).transform(&mut schema);
    schema.insert("title".to_owned(), title.into());
    schema.to_value()
}

/// An optional field is left out; it is never written as null.
fn forbid_null(schema: &mut Schema) {
    // What has alternatives of its own is wrapped in more.
    if let Some(Value::Array(variants)) = schema.get("anyOf")
        && let [Value::Object(only), Value::Object(null)] = variants.as_slice()
        && null.get("type") == Some(&Value::from("null"))
    {
        let only = only.clone();
        schema.remove("anyOf");
        let said = schema.remove("description");
        for (name, value) in only {
            schema.insert(name, value);
        }
        if let Some(said) = said {
            schema.insert("description".to_owned(), said);
        }
    }
    let Some(Value::Array(types)) = schema.get_mut("type") else {
        return;
    };
    types.retain(|name| name != "null");
    if let [only] = types.as_slice() {
        let only = only.clone();
        schema.insert("type".to_owned(), only);
    }
}
