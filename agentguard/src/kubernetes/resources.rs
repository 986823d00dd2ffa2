//! The custom resource definitions, made from the types that manifests are written by.
//!
//! Pure. A JSON Schema becomes the form that an API server takes (a structural schema): alternatives
//! keep what must be there and nothing else, conditions become alternatives. Fields that are not
//! known are kept and not pruned, so that the reader refuses them as it does in files: a slip of
//! the pen in `except` must not widen a scope in silence.
//!
//! What is checked between fields is said as alternatives, which every API server from 1.16 on
//! checks. What only CEL can say is a policy of its own beside them ([`admission_policy`]): against
//! an API server that does not know CEL rules, `kubectl apply` refuses a definition that has some.

use serde_json::{Map, Value, json};

use super::manifests::ObjectKind;
use crate::manifest::{API_VERSION, schema};

/// The longest time that RFC 3339 writes with nanoseconds and offset, in characters.
const TIME_CHARACTERS: u64 = 35;

/// The two parts of [`API_VERSION`].
pub(super) fn group_and_version() -> (&'static str, &'static str) {
    match API_VERSION.split_once('/') {
        Some(parts) => parts,
        // A constant, which a test reads.
        None => unreachable!("{API_VERSION} has no group"),
    }
}

/// Each definition, by the name of its file.
#[must_use]
pub fn definitions() -> Vec<(String, Value)> {
    ObjectKind::ALL
        .into_iter()
        .map(|kind| (format!("{}.yaml", kind.plural()), definition(kind)))
        .collect()
}

fn definition(kind: ObjectKind) -> Value {
    let (group, version) = group_and_version();
    let (scope, short) = match kind {
        ObjectKind::Scope => ("Cluster", "agscope"),
        ObjectKind::Grant => ("Namespaced", "aggrant"),
        ObjectKind::ClusterGrant => ("Cluster", "agcgrant"),
    };
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{}.{group}", kind.plural())},
        "spec": {
            "group": group,
            "names": {
                "kind": kind.as_str(),
                "listKind": format!("{}List", kind.as_str()),
                "plural": kind.plural(),
                "singular": kind.singular(),
                "shortNames": [short],
                "categories": ["agentguard"],
            },
            "scope": scope,
            "versions": [{
                "name": version,
                "served": true,
                "storage": true,
                "schema": {"openAPIV3Schema": object_schema(kind)},
                "subresources": {"status": {}},
                "additionalPrinterColumns": columns(kind),
            }],
        },
    })
}

fn object_schema(kind: ObjectKind) -> Value {
    let title = kind.as_str();
    let schemas = schema::schemas();
    let whole = schemas.into_iter().map(|(_, schema)| schema).find(|s| s["title"] == title);
    let Some(whole) = whole else {
        // Each kind has one, which a test reads.
        unreachable!("{title} has no schema");
    };
    let mut spec = structural(&whole["properties"]["spec"]);
    match kind {
        ObjectKind::Scope => {}
        ObjectKind::Grant | ObjectKind::ClusterGrant => grant_rules(&mut spec),
    }
    json!({
        "type": "object",
        "description": whole["description"],
        "required": ["spec"],
        "properties": {
            // Known to every object, and checked by the API server itself.
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status(),
        },
    })
}

/// What no alternative of required fields can say.
fn grant_rules(spec: &mut Value) {
    for time in ["notBefore", "expiresAt"] {
        // A bound on the price of comparing them.
        spec["properties"][time]["maxLength"] = TIME_CHARACTERS.into();
    }
}

/// What of a grant is refused by those API servers that know admission policies (from 1.30 on):
/// each node refuses the same, and says so in the status.
#[must_use]
pub fn admission_policy() -> Vec<Value> {
    let (group, version) = group_and_version();
    let name = format!("grants.{group}");
    let has_two_times = "has(object.spec.notBefore) && has(object.spec.expiresAt) \
                         && object.spec.expiresAt != 'never'";
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [{
                "apiGroups": [group],
                "apiVersions": [version],
                "operations": ["CREATE", "UPDATE"],
                "resources": [ObjectKind::Grant.plural(), ObjectKind::ClusterGrant.plural()],
            }]},
            "validations": [{
                "expression": format!(
                    "!({has_two_times}) \
                     || timestamp(object.spec.notBefore) < timestamp(object.spec.expiresAt)"
                ),
                "message": "spec.expiresAt is not after spec.notBefore, so the grant would never \
                            permit anything; write a later time",
            }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    });
    vec![policy, binding]
}

/// What the nodes say of an object. Each has an entry of its own, which nobody else writes.
fn status() -> Value {
    json!({
        "type": "object",
        "description": "What the nodes say of it.",
        "properties": {
            "observedGeneration": {
                "type": "integer", "format": "int64",
                "description": "The newest generation that a node has read.",
            },
            "enforced": {
                "type": "integer", "format": "int32",
                "description": "On how many nodes its newest generation is in force.",
            },
            "nodes": {
                "type": "array",
                // An old API server makes null of a list from which the last entry is taken.
                "nullable": true,
                "description": "The nodes on which it is in force, or should be.",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "description": "The name of the node."},
                        "generation": {
                            "type": "integer", "format": "int64",
                            "description": "The generation that counts there.",
                        },
                        "state": {
                            "type": "string",
                            "description": "Where a grant is in its life there.",
                        },
                        "error": {
                            "type": "string",
                            "description": "Why it is not the newest one, or not in force.",
                        },
                    },
                },
            },
            "conditions": {
                "type": "array",
                "description": "`Enforced`, `Valid` with what is wrong, and of a grant `Active` \
                                with where it is in its life.",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "lastTransitionTime", "reason", "message"],
                    "properties": {
                        "type": {"type": "string", "maxLength": 316},
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                        "reason": {"type": "string", "minLength": 1, "maxLength": 1024},
                        "message": {"type": "string", "maxLength": 32768},
                    },
                },
            },
        },
    })
}

/// What `kubectl get` shows.
fn columns(kind: ObjectKind) -> Value {
    let column = |name: &str, path: &str| json!({"name": name, "type": "string", "jsonPath": path});
    let wide = |name: &str, path: &str| json!({"name": name, "type": "string", "jsonPath": path, "priority": 1});
    let valid = column("Valid", ".status.conditions[?(@.type==\"Valid\")].status");
    let nodes = json!({"name": "Nodes", "type": "integer", "jsonPath": ".status.enforced"});
    let age = json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"});
    let error = wide("Error", ".status.conditions[?(@.type==\"Valid\")].message");
    match kind {
        ObjectKind::Scope => json!([
            column("Scope", ".spec.scope"),
            column("Description", ".spec.description"),
            valid,
            nodes,
            age,
            error,
        ]),
        ObjectKind::Grant | ObjectKind::ClusterGrant => json!([
            column("Subject", ".spec.subject.spiffeId"),
            wide("Prefix", ".spec.subject.spiffeIdPrefix"),
            column("Scopes", ".spec.scopes"),
            column("Expires", ".spec.expiresAt"),
            column("TTL", ".spec.ttl"),
            column("State", ".status.conditions[?(@.type==\"Active\")].reason"),
            valid,
            nodes,
            age,
            wide("Granted by", ".spec.grantedBy"),
            wide("Reason", ".spec.reason"),
            error,
        ]),
    }
}

/// A JSON Schema as an API server takes it.
fn structural(schema: &Value) -> Value {
    let Some(fields) = schema.as_object() else { return schema.clone() };
    let mut made = Map::new();
    let mut all_of: Vec<Value> = Vec::new();
    for (name, value) in fields {
        match name.as_str() {
            // What API servers know nothing of, or forbid.
            "$schema" | "title" | "uniqueItems" | "format" | "then" | "else" => {}
            "const" => drop(made.insert("enum".to_owned(), json!([value]))),
            "if" => all_of.extend(implications(fields, value)),
            "dependentRequired" => {
                let pairs = value.as_object().into_iter().flatten();
                all_of.extend(pairs.map(|(field, needs)| {
                    json!({"anyOf": [{"not": {"required": [field]}}, {"required": needs}]})
                }));
            }
            "additionalProperties" if value.is_object() => {
                made.insert(name.clone(), structural(value));
            }
            "additionalProperties" => {
                made.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
            }
            "properties" => {
                let inner = value.as_object().into_iter().flatten();
                let inner = inner.map(|(name, schema)| (name.clone(), structural(schema)));
                merge(&mut made, inner);
            }
            "items" => drop(made.insert(name.clone(), structural(value))),
            "oneOf" => alternatives(&mut made, value),
            _ => drop(made.insert(name.clone(), value.clone())),
        }
    }
    if !all_of.is_empty() {
        made.insert("allOf".to_owned(), all_of.into());
    }
    made.into()
}

fn merge(made: &mut Map<String, Value>, properties: impl Iterator<Item = (String, Value)>) {
    let all = made.entry("properties").or_insert_with(|| json!({}));
    if let Some(all) = all.as_object_mut() {
        all.extend(properties);
    }
}

/// If one holds, so does the other; if it does not, the third.
fn implications(fields: &Map<String, Value>, condition: &Value) -> Vec<Value> {
    let then = fields.get("then").map(|then| json!({"anyOf": [{"not": condition}, then]}));
    let other = fields.get("else").map(|other| json!({"anyOf": [condition, other]}));
    then.into_iter().chain(other).collect()
}

/// Alternatives with fields of their own, as an enum of our types has them, become one object with
/// the fields of all, of which each alternative requires its own.
fn alternatives(made: &mut Map<String, Value>, variants: &Value) {
    let variants = variants.as_array().map_or(&[][..], Vec::as_slice);
    if !variants.iter().all(|variant| variant["properties"].is_object()) {
        made.insert("oneOf".to_owned(), variants.into());
        return;
    }
    let mut required = Vec::new();
    for variant in variants {
        required.push(json!({"required": variant["required"]}));
        let about = variant["description"].clone();
        let own = variant["properties"].as_object().into_iter().flatten();
        let own = own.map(|(name, schema)| {
            let mut schema = structural(schema);
            if schema["description"].is_null() && !about.is_null() {
                schema["description"] = about.clone();
            }
            (name.clone(), schema)
        });
        merge(made, own);
    }
    made.insert("type".to_owned(), "object".into());
    made.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
    made.insert("oneOf".to_owned(), required.into());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::identity::pod::{AGENT, MODE};
    use crate::manifest::{Creation, parse_text};

    /// What makes an API server refuse a definition, by the place in it.
    fn not_structural(
        path: &str,
        schema: &Value,
        is_inside_junctor: bool,
        found: &mut Vec<String>,
    ) {
        let Some(fields) = schema.as_object() else { return };
        if !is_inside_junctor && !fields.contains_key("type") {
            found.push(format!("{path} has no type"));
        }
        for (name, value) in fields {
            let here = format!("{path}.{name}");
            match name.as_str() {
                "properties" => {
                    for (name, schema) in value.as_object().unwrap() {
                        let inner = format!("{here}.{name}");
                        not_structural(&inner, schema, is_inside_junctor, found);
                    }
                }
                "items" => not_structural(&here, value, is_inside_junctor, found),
                "additionalProperties" => {
                    if is_inside_junctor || !value.is_object() || fields.contains_key("properties")
                    {
                        found.push(here.clone());
                    }
                    not_structural(&here, value, is_inside_junctor, found);
                }
                "not" => not_structural(&here, value, true, found),
                "allOf" | "anyOf" | "oneOf" => {
                    for schema in value.as_array().unwrap() {
                        not_structural(&here, schema, true, found);
                    }
                }
                "type" | "description" if is_inside_junctor => found.push(here),
                "const" | "$schema" | "title" | "uniqueItems" | "if" | "then" | "else"
                | "dependentRequired" | "$ref" => found.push(here),
                _ => {}
            }
        }
    }

    #[test]
    fn every_schema_is_structural() {
        for (file, definition) in definitions() {
            let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            let mut found = Vec::new();
            not_structural("", schema, false, &mut found);
            assert_eq!(found, [""; 0], "{file}");
            assert!(schema["properties"]["spec"]["properties"].is_object(), "{file}");
        }
    }

    /// The API server's own validation of values is JSON Schema's, which is at hand here.
    #[test]
    fn definitions_accept_and_refuse_as_the_reader_does() {
        let spec = |kind: ObjectKind| {
            let all = definitions();
            let (_, definition) = all
                .into_iter()
                .find(|(name, _)| *name == format!("{}.yaml", kind.plural()))
                .unwrap();
            let schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
            jsonschema::validator_for(&schema["properties"]["spec"]).unwrap()
        };
        let scope = spec(ObjectKind::Scope);
        let to = |to: Value| {
            json!({"scope": "a", "description": "d", "egress": [
                {"to": [to], "ports": [{"protocol": "TCP", "port": 1}]}]})
        };
        let labels = json!({"matchLabels": {"a": "b"}});
        for good in [
            json!({"ipBlock": {"cidr": "192.0.2.0/24"}}),
            json!({"service": {"namespace": "a", "name": "b"}}),
            json!({"namespaceSelector": labels}),
            json!({"namespaceSelector": labels, "podSelector": labels}),
        ] {
            assert!(scope.is_valid(&to(good.clone())), "{good}");
        }
        for bad in [
            json!({}),
            json!({"podSelector": labels}),
            json!({"namespaceSelector": {}}),
            json!({"service": {"name": "b"}}),
            json!({"service": {"namespace": "a", "name": "b"}, "namespaceSelector": labels}),
            json!({"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
            json!({"namespaceSelector": {"matchExpressions": [
                {"key": "a", "operator": "Exists", "values": ["b"]}]}}),
        ] {
            assert!(!scope.is_valid(&to(bad.clone())), "{bad}");
        }
        let ports = |ports: Value| json!({"scope": "a", "description": "d", "listen": [ports]});
        assert!(scope.is_valid(&ports(json!({"protocol": "TCP", "port": 1, "endPort": 2}))));
        for bad in [
            json!({"protocol": "TCP", "endPort": 2}),
            json!({"protocol": "ICMP", "port": 2}),
            json!({"protocol": "tcp"}),
            json!({"protocol": "TCP", "port": 65536}),
        ] {
            assert!(!scope.is_valid(&ports(bad.clone())), "{bad}");
        }
        let grant = spec(ObjectKind::Grant);
        let with = |more: &[(&str, &str)], subject: Value| {
            let mut spec =
                json!({"subject": subject, "scopes": ["a"], "grantedBy": "m", "reason": "r"});
            for (name, value) in more {
                spec[*name] = (*value).into();
            }
            grant.is_valid(&spec)
        };
        let exact = json!({"spiffeId": "spiffe://example.org/a"});
        assert!(with(&[("ttl", "8h")], exact.clone()));
        assert!(with(&[("expiresAt", "never")], exact.clone()));
        assert!(!with(&[], exact.clone()));
        assert!(!with(&[("ttl", "8h"), ("expiresAt", "never")], exact.clone()));
        assert!(!with(&[("ttl", "8h")], json!({})));
        let both = json!({"spiffeId": "spiffe://e/a", "spiffeIdPrefix": "spiffe://e/"});
        assert!(!with(&[("ttl", "8h")], both));
        let unknown = json!({"spiffeId": "spiffe://e/a", "spiffeID": "x"});
        // Kept for the reader, which refuses it and says so.
        assert!(with(&[("ttl", "8h")], unknown));
    }

    /// Whether an API server with admission policies takes a grant, by an interpreter of their language.
    fn is_admitted(grant: &Value) -> bool {
        let policy = &admission_policy()[0]["spec"]["validations"];
        let [rule] = &policy.as_array().unwrap()[..] else { panic!("{policy}") };
        let env = Arc::new(cel::Env::stdlib());
        let rule = env.compile(rule["expression"].as_str().unwrap()).unwrap();
        let mut context = cel::Context::with_env(env);
        context.add_variable("object", grant).unwrap();
        match rule.execute(&context) {
            Ok(cel::Value::Bool(is_admitted)) => is_admitted,
            other => panic!("{other:?} for {grant}"),
        }
    }

    #[test]
    fn the_admission_policy_judges_times_as_the_reader_does() {
        let (early, late) = ("2030-01-01T00:00:00Z", "2030-01-01T00:00:00.5Z");
        // An hour before `early`, by another clock.
        let east = "2030-01-01T00:30:00+01:30";
        let windows: [(&[(&str, &str)], bool); 10] = [
            (&[("ttl", "8h")], true),
            (&[("notBefore", early), ("ttl", "8h")], true),
            (&[("expiresAt", early)], true),
            (&[("expiresAt", "never")], true),
            (&[("notBefore", early), ("expiresAt", "never")], true),
            (&[("notBefore", early), ("expiresAt", late)], true),
            (&[("notBefore", late), ("expiresAt", early)], false),
            (&[("notBefore", early), ("expiresAt", early)], false),
            (&[("notBefore", early), ("expiresAt", east)], false),
            (&[("notBefore", east), ("expiresAt", early)], true),
        ];
        let created = Creation::At("2029-12-31T23:00:00Z".parse().unwrap());
        for (times, is_sound) in windows {
            let mut spec = json!({"subject": {"spiffeId": "spiffe://e/a"}, "scopes": ["a"],
                "grantedBy": "m", "reason": "r"});
            for (name, time) in times {
                spec[*name] = (*time).into();
            }
            let (group, version) = group_and_version();
            let grant = json!({"apiVersion": format!("{group}/{version}"), "kind": "Grant",
                "metadata": {"name": "a"}, "spec": spec});
            let (_, errors) = parse_text("f", grant.to_string().as_bytes(), created);
            assert_eq!(errors.is_empty(), is_sound, "{errors:?}");
            assert_eq!(is_admitted(&grant), is_sound, "{grant}");
        }
    }

    /// What the chart's policy for pods says, without what helm fills in.
    fn pod_rules() -> Vec<String> {
        let text = include_str!("../../../deploy/helm/agentguard/templates/pod-policy.yaml");
        let plain: Vec<&str> = text.lines().filter(|line| !line.contains("{{")).collect();
        let plain = plain.join("\n");
        let (policy, _binding) = plain.split_once("\n---\n").unwrap();
        let policy: Value = serde_saphyr::from_str(policy).unwrap();
        let rules = policy["spec"]["validations"].as_array().unwrap();
        rules.iter().map(|rule| rule["expression"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_pod_can_not_take_itself_out_of_what_its_namespace_says() {
        let rules = pod_rules();
        assert_eq!(rules.len(), 2);
        let env = Arc::new(cel::Env::stdlib());
        let rules: Vec<_> = rules.iter().map(|rule| env.compile(rule).unwrap()).collect();
        let object = |labels: &[(&str, &str)]| {
            let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
            match labels.len() {
                0 => json!({"metadata": {"name": "a"}}),
                _ => json!({"metadata": {"name": "a", "labels": labels}}),
            }
        };
        let takes = |namespace: &Value, before: Option<&Value>, pod: &Value| {
            rules.iter().all(|rule| {
                let mut context = cel::Context::with_env(Arc::clone(&env));
                let operation = if before.is_some() { "UPDATE" } else { "CREATE" };
                context.add_variable("object", pod).unwrap();
                context.add_variable("oldObject", &before.cloned()).unwrap();
                context.add_variable("namespaceObject", namespace).unwrap();
                context.add_variable("request", &json!({"operation": operation})).unwrap();
                match rule.execute(&context) {
                    Ok(cel::Value::Bool(takes)) => takes,
                    other => panic!("{other:?} for {pod} in {namespace}"),
                }
            })
        };
        let enforced = object(&[(AGENT, "true"), (MODE, "enforce")]);
        let audited = object(&[(AGENT, "true"), (MODE, "audit")]);
        let (plain, free) = (object(&[]), object(&[(AGENT, "false")]));
        for pod in [&plain, &enforced, &object(&[("app", "a")])] {
            assert!(takes(&enforced, None, pod), "{pod}");
        }
        for pod in [&free, &audited, &object(&[(MODE, "enforced")])] {
            assert!(!takes(&enforced, None, pod), "{pod}");
            assert!(!takes(&enforced, Some(&plain), pod), "it was not so before: {pod}");
            assert!(takes(&enforced, Some(pod), pod), "it was so before: {pod}");
            assert!(takes(&plain, None, pod), "the namespace says nothing: {pod}");
        }
        assert!(takes(&audited, None, &audited) && takes(&audited, None, &enforced));
        assert!(!takes(&audited, None, &free));
    }
}
