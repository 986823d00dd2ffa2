//! The reader, the writer and the schemas say the same.

use std::fs;

use jsonschema::Validator;
use serde_json::{Value as Json, json};

use super::*;
use crate::manifest::schema::schemas;

/// Manifests that together fill every field.
fn complete() -> Vec<Json> {
    let envelope = |kind: &str, spec: Json| json!({"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": "a.b-c"}, "spec": spec});
    let grant = |subject: Json, time: (&str, &str)| {
        let mut spec = json!({
            "subject": subject,
            "scopes": ["github:read", "b"],
            "notBefore": "2026-11-22T09:00:00Z",
            "grantedBy": "platform-team",
            "reason": "OPS-1234",
        });
        spec[time.0] = time.1.into();
        envelope("Grant", spec)
    };
    let workload = |select: Json, mode: &str| {
        envelope(
            "Workload",
            json!({"select": select, "spiffeId": "spiffe://example.org/a/b", "mode": mode}),
        )
    };
    let exact = json!({"spiffeId": "spiffe://example.org/a"});
    let mut all = vec![
        envelope(
            "Scope",
            json!({
                "scope": "github:read",
                "description": "a description",
                "egress": [{
                    "to": [
                        {"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}},
                        {"ipBlock": {"cidr": "2001:db8::/32"}},
                        {"service": {"namespace": "tools", "name": "git"}},
                        {
                            "podSelector": {"matchLabels": {"app": "db", "example.org/tier": "b"}},
                            "namespaceSelector": {"matchExpressions": [
                                {"key": "team", "operator": "In", "values": ["a", "b"]},
                                {"key": "old", "operator": "DoesNotExist"},
                            ]},
                        },
                        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "a"}}},
                    ],
                    "ports": [
                        {"protocol": "TCP", "port": 443},
                        {"protocol": "SCTP", "port": 8000, "endPort": 8100},
                        {"protocol": "UDP"},
                        {"protocol": "ICMP"},
                        {"protocol": "Any"},
                    ],
                }],
                "exec": [{"path": "/usr/bin/git"}, {"path": "/usr/lib/*/git-core/**"}],
                "unixSockets": [{"path": "/run/agent/tool.sock"}, {"abstract": "agent-tool"}],
                "listen": [{"protocol": "TCP", "port": 8080}],
            }),
        ),
        grant(exact.clone(), ("expiresAt", "2026-11-22T17:00:00Z")),
        grant(json!({"spiffeIdPrefix": "spiffe://example.org/ns/"}), ("expiresAt", "never")),
        grant(exact.clone(), ("ttl", "8h")),
        {
            let mut of_namespace = grant(exact, ("expiresAt", "never"));
            of_namespace["metadata"]["namespace"] = "agents".into();
            of_namespace
        },
        workload(json!({"cgroup": "/agents.slice/researcher-*.service"}), "enforce"),
        workload(json!({"systemdUnit": "researcher.service"}), "audit"),
    ];
    // What no namespace owns is the same under the other name.
    let of_none =
        all.iter().filter(|one| one["kind"] == "Grant" && one["metadata"]["namespace"].is_null());
    let of_cluster: Vec<Json> = of_none
        .cloned()
        .map(|mut one| {
            one["kind"] = "ClusterGrant".into();
            one
        })
        .collect();
    all.extend(of_cluster);
    all
}

fn read(manifest: &Json) -> (Vec<Manifest>, Vec<ManifestError>) {
    let created = Creation::At(at("2026-11-22T09:00:00Z"));
    parse_text("f", manifest.to_string().as_bytes(), created)
}

fn schema_for(manifest: &Json) -> Json {
    let file = format!("{}.schema.json", manifest["kind"].as_str().unwrap().to_lowercase());
    schemas().into_iter().find(|(name, _)| *name == file).unwrap().1
}

fn validator_for(manifest: &Json) -> Validator {
    jsonschema::validator_for(&schema_for(manifest)).unwrap()
}

/// The JSON pointers of `value` and of everything inside.
fn pointers(value: &Json) -> Vec<String> {
    let mut all = vec![String::new()];
    let children: Vec<(String, &Json)> = match value {
        Json::Object(fields) => {
            let escaped = |name: &str| name.replace('~', "~0").replace('/', "~1");
            fields.iter().map(|(name, value)| (escaped(name), value)).collect()
        }
        Json::Array(items) => {
            items.iter().enumerate().map(|(index, value)| (index.to_string(), value)).collect()
        }
        Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => Vec::new(),
    };
    for (name, child) in children {
        all.extend(pointers(child).into_iter().map(|inner| format!("/{name}{inner}")));
    }
    all
}

/// Every manifest that differs from `manifest` in one structural way.
fn variations(manifest: &Json) -> Vec<(String, Json)> {
    let mut all = Vec::new();
    let mut vary = |what: String, change: &dyn Fn(&mut Json)| {
        let mut varied = manifest.clone();
        change(&mut varied);
        if varied != *manifest {
            all.push((what, varied));
        }
    };
    for pointer in pointers(manifest) {
        for replacement in [
            Json::Null,
            json!(true),
            json!(7),
            json!(0),
            json!(70000),
            json!(""),
            json!([]),
            json!({}),
        ] {
            // A manifest of no kind has no schema to agree with.
            if pointer.is_empty() || pointer == "/kind" {
                continue;
            }
            // That a range ends after it begins is beyond what a schema can say.
            if pointer.ends_with("/endPort") && replacement == json!(7) {
                continue;
            }
            vary(format!("{pointer} := {replacement}"), &|varied| {
                *varied.pointer_mut(&pointer).unwrap() = replacement.clone();
            });
        }
        match manifest.pointer(&pointer).unwrap() {
            Json::Object(fields) => {
                for name in fields.keys().filter(|name| *name != "kind") {
                    vary(format!("{pointer} without {name}"), &|varied| {
                        varied.pointer_mut(&pointer).unwrap().as_object_mut().unwrap().remove(name);
                    });
                }
                for name in [
                    "unknown",
                    "ttl",
                    "expiresAt",
                    "port",
                    "endPort",
                    "dnsName",
                    "unixSockets",
                    "cgroup",
                    "systemdUnit",
                    "spiffeId",
                    "spiffeIdPrefix",
                    "podSelector",
                    "namespaceSelector",
                    "service",
                    "values",
                ] {
                    vary(format!("{pointer} with {name}"), &|varied| {
                        let fields = varied.pointer_mut(&pointer).unwrap().as_object_mut().unwrap();
                        fields.entry(name).or_insert_with(|| match name {
                            "port" => json!(8000),
                            "endPort" => json!(65535),
                            "ttl" => json!("9h"),
                            "expiresAt" => json!("2036-01-01T00:00:00Z"),
                            "unixSockets" => json!([{"path": "/run/a"}]),
                            "dnsName" => json!("example.org"),
                            "podSelector" | "namespaceSelector" => {
                                json!({"matchLabels": {"a": "b"}})
                            }
                            "service" => json!({"namespace": "a", "name": "b"}),
                            "values" => json!(["a"]),
                            "cgroup" => json!("/a"),
                            "systemdUnit" => json!("a.service"),
                            "spiffeIdPrefix" => json!("spiffe://example.org/"),
                            _ => json!("spiffe://example.org/z"),
                        });
                    });
                }
            }
            Json::Array(_) => vary(format!("{pointer} repeated"), &|varied| {
                let items = varied.pointer_mut(&pointer).unwrap().as_array_mut().unwrap();
                items.push(items[0].clone());
            }),
            Json::String(_) => vary(format!("{pointer} is a list"), &|varied| {
                let place = varied.pointer_mut(&pointer).unwrap();
                *place = json!([place.clone()]);
            }),
            Json::Null | Json::Bool(_) | Json::Number(_) => {}
        }
    }
    all
}

#[test]
fn every_document_reads_back_as_it_is_written() {
    for manifest in complete() {
        let (manifests, errors) = read(&manifest);
        assert_eq!(errors, [], "{manifest}");
        let [first] = manifests.as_slice() else { panic!("{manifests:?}") };
        let written = first.to_manifest_json();
        let (again, errors) = read(&written);
        assert_eq!(errors, [], "{written}");
        assert_eq!(again[0].to_manifest_json(), written);
        match (first, &again[0]) {
            (Manifest::Scope(a), Manifest::Scope(b)) => assert_eq!(a.document, b.document),
            (Manifest::Grant(a), Manifest::Grant(b)) => assert_eq!(a.document, b.document),
            (Manifest::Workload(a), Manifest::Workload(b)) => assert_eq!(a.document, b.document),
            (a, b) => panic!("{a:?} became {b:?}"),
        }
        // A grant is written as what it is where there are no namespaces.
        if manifest["spec"].get("ttl").is_none() && manifest["kind"] != "ClusterGrant" {
            assert_eq!(written, manifest);
        }
    }
}

#[test]
fn every_structural_variation_is_accepted_by_both_or_by_neither() {
    let mut disagreements = Vec::new();
    for manifest in complete() {
        let validator = validator_for(&manifest);
        assert!(validator.is_valid(&manifest), "{manifest}");
        for (what, varied) in variations(&manifest) {
            let (_, errors) = read(&varied);
            if validator.is_valid(&varied) != errors.is_empty() {
                disagreements.push(format!("{} {what}: {errors:?}", manifest["kind"]));
            }
        }
    }
    assert!(disagreements.is_empty(), "{disagreements:#?}");
}

#[test]
fn the_schemas_have_no_field_that_the_complete_manifests_lack() {
    fn properties(schema: &Json, found: &mut Vec<String>) {
        match schema {
            Json::Object(fields) => {
                if let Some(Json::Object(names)) = fields.get("properties")
                    && fields.contains_key("additionalProperties")
                {
                    found.extend(names.keys().cloned());
                }
                fields.values().for_each(|inner| properties(inner, found));
            }
            Json::Array(items) => items.iter().for_each(|inner| properties(inner, found)),
            Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) => {}
        }
    }
    for (file, schema) in schemas() {
        let written: Vec<String> = complete()
            .iter()
            .filter(|manifest| schema_for(manifest) == schema)
            .flat_map(pointers)
            .filter_map(|pointer| pointer.rsplit('/').next().map(str::to_owned))
            .collect();
        let mut in_schema = Vec::new();
        properties(&schema, &mut in_schema);
        assert!(in_schema.len() > 5, "{file}: {in_schema:?}");
        for name in in_schema {
            assert!(written.contains(&name), "{file}: {name}");
        }
    }
}

#[test]
fn every_example_satisfies_its_schema() {
    let (manifests, errors) = parse_paths(&[repository("deploy/examples")]);
    assert_eq!(errors, []);
    for manifest in manifests {
        let json = manifest.to_manifest_json();
        assert!(validator_for(&json).is_valid(&json), "{json:#}");
    }
}

/// Run with `AGENTGUARD_WRITE_SCHEMAS=1` to write the files anew.
#[test]
fn the_schemas_that_are_checked_in_are_fresh() {
    for (file, schema) in schemas() {
        let path = repository("deploy/schemas").join(file);
        let text = format!("{schema:#}\n");
        if std::env::var_os("AGENTGUARD_WRITE_SCHEMAS").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        let found: Json = serde_json::from_str(&found).unwrap_or_default();
        assert!(found == schema, "{file} is stale; run with AGENTGUARD_WRITE_SCHEMAS=1");
    }
}
