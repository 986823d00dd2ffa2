//! What is shipped for Prometheus and Grafana asks for metrics that there are, in queries that parse.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::ALL;

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

fn promtool(arguments: &[&str], directory: &Path) {
    let output = Command::new("promtool")
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("promtool is needed: apt-get install -y --no-install-recommends prometheus");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
}

/// Names of metrics that a text mentions, those of recording rules left out, which have colons.
fn mentioned(text: &str) -> BTreeSet<&str> {
    text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_' && letter != ':')
        .filter(|word| word.starts_with("agentguard_"))
        .collect()
}

fn is_there(name: &str) -> bool {
    ALL.iter().any(|metric| {
        let is_part = |suffix| name.strip_suffix(suffix) == Some(metric.name);
        name == metric.name
            || metric.kind.as_str() == "histogram"
                && ["_bucket", "_sum", "_count"].into_iter().any(is_part)
    })
}

/// Every query of the dashboard, with Grafana's variables filled in.
fn queries() -> Vec<String> {
    let text = std::fs::read_to_string(deploy("grafana/agentguard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let mut queries = Vec::new();
    for target in targets {
        let query = target["expr"].as_str().unwrap();
        let mut query = query.to_owned();
        for (variable, value) in [
            ("$__rate_interval", "5m"),
            ("$__range", "1h"),
            ("$instance", ".*"),
            ("$identity", ".*"),
        ] {
            query = query.replace(variable, value);
        }
        assert!(!query.contains('$'), "{query} has a variable that no dashboard defines");
        queries.push(query);
    }
    queries
}

#[test]
fn the_rules_hold_what_their_tests_say() {
    let directory = deploy("prometheus");
    promtool(&["check", "rules", "agentguard.rules.yaml"], &directory);
    promtool(&["test", "rules", "agentguard.rules.test.yaml"], &directory);
}

#[test]
fn rules_and_dashboard_ask_for_metrics_that_there_are() {
    let rules = std::fs::read_to_string(deploy("prometheus/agentguard.rules.yaml")).unwrap();
    let queries = queries();
    assert!(queries.len() >= 15, "the dashboard has lost its panels");
    for text in queries.iter().map(String::as_str).chain([rules.as_str()]) {
        for name in mentioned(text) {
            assert!(is_there(name), "{name} is no metric of the daemon: {text}");
        }
    }
}

#[test]
fn the_dashboards_queries_parse() {
    let directory = tempfile::tempdir().unwrap();
    let rules: Vec<Value> = queries()
        .into_iter()
        .enumerate()
        .map(|(number, query)| serde_json::json!({"record": format!("query:{number}"), "expr": query}))
        .collect();
    let file = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(directory.path().join("rules.json"), file.to_string()).unwrap();
    promtool(&["check", "rules", "rules.json"], directory.path());
}

#[test]
fn every_panel_is_described_and_lies_beside_the_others() {
    let text = std::fs::read_to_string(deploy("grafana/agentguard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let mut taken = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel} has another's id");
        assert!(!panel["title"].as_str().unwrap().is_empty());
        let of = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(of("x") + of("w") <= 24, "{} is wider than the page", panel["title"]);
        for x in of("x")..of("x") + of("w") {
            for y in of("y")..of("y") + of("h") {
                assert!(taken.insert((x, y)), "{} lies over another", panel["title"]);
            }
        }
    }
}
