//! What the dashboard shows of the cluster.
//!
//! Grafana is in no distribution's archive; what it would show is what Prometheus answers to each query of
//! each panel. All of it is printed, and left in the node's scratch directory for whoever wants to draw it.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    agents::{Agents, BRIEF},
    apply, kubectl,
    metrics::query,
};
use crate::{interrupt, kubernetes::cluster::Cluster, run::root};

/// What is looked back on.
const RANGE: Duration = Duration::from_secs(30);

/// Where the answers are left.
const FILE: &str = "dashboard.json";

/// Each panel has something to show, in a cluster where all that it is made for has happened.
pub(super) fn shows_what_happened(cluster: &mut Cluster<'_>, _: &Agents) -> Result<()> {
    // Until everything that is looked back on was asked for by Prometheus; in the middle of it something
    // changes, so that there is a change to show the time of.
    interrupt::sleep(RANGE / 2)?;
    apply(cluster, BRIEF, &[("$TTL", "600s")])?;
    kubectl(cluster, &["--namespace", "agents", "delete", "grant", "brief"])?;
    interrupt::sleep(RANGE / 2)?;
    let path = root().join("deploy/grafana/agentguard.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    let panels = dashboard["panels"].as_array().context("a dashboard has panels")?;
    let end = Timestamp::now().as_second();
    let start = end - RANGE.as_secs() as i64;
    let mut shown = Vec::new();
    for panel in panels {
        let title = panel["title"].as_str().with_context(|| format!("{panel} has no title"))?;
        // A heading.
        if panel["type"] == "row" {
            println!("          {title}");
            continue;
        }
        let targets = panel["targets"].as_array();
        let targets = targets.with_context(|| format!("the panel {title:?} asks nothing"))?;
        let mut series = Vec::new();
        for target in targets {
            let expression = target["expr"].as_str();
            let expression = expression.with_context(|| format!("{title}: {target}"))?;
            let expression = filled(expression);
            let arguments = [
                ("query", expression.as_str()),
                ("start", &start.to_string()),
                ("end", &end.to_string()),
                ("step", "1"),
            ];
            let said = query(cluster, "query_range", &arguments)
                .with_context(|| format!("{title}: {expression}"))?;
            let found = said["data"]["result"].as_array();
            let found = found.with_context(|| format!("{title}: {expression} gives {said}"))?;
            ensure!(
                found.iter().any(has_a_number),
                "the panel {title:?} shows nothing: {expression} gives {said}"
            );
            series.extend(found.iter().cloned());
        }
        println!("            {title}: {}", series.iter().map(told).collect::<Vec<_>>().join("; "));
        shown.push(json!({"title": title, "unit": panel["fieldConfig"]["defaults"]["unit"],
            "position": panel["gridPos"], "series": series}));
    }
    // Nobody asks it any more.
    cluster.stop_program("prometheus")?;
    let file = cluster.node().scratch().join(FILE);
    fs::write(&file, format!("{:#}\n", Value::from(shown)))?;
    println!("seen      every panel shows something: {}", file.display());
    Ok(())
}

/// Whether a series has a point that can be drawn.
fn has_a_number(series: &Value) -> bool {
    let values = series["values"].as_array().into_iter().flatten();
    values.filter_map(|pair| pair[1].as_str()?.parse::<f64>().ok()).any(f64::is_finite)
}

/// With what Grafana puts in place of its variables where nothing is chosen.
fn filled(expression: &str) -> String {
    let range = format!("{}s", RANGE.as_secs());
    [("$__rate_interval", "15s"), ("$__range", &range), ("$instance", ".*"), ("$identity", ".*")]
        .iter()
        .fold(expression.to_owned(), |text, (name, value)| text.replace(name, value))
}

/// A series as its labels and its last value.
fn told(series: &Value) -> String {
    let labels = series["metric"].as_object().into_iter().flatten();
    let labels: Vec<&str> = labels.filter_map(|(_, value)| value.as_str()).collect();
    let last = series["values"].as_array().and_then(|values| values.last());
    let last = last.and_then(|pair| pair[1].as_str()).unwrap_or("nothing");
    [labels.join(" ").as_str(), last].join(" ").trim().to_owned()
}
