//! What a daemon answers at its metrics address.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

/// An address of loopback that nothing listens on yet.
///
/// # Panics
///
/// When loopback is down.
#[must_use]
pub fn unused_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is up");
    listener.local_addr().expect("it is bound")
}

/// What a path of the metrics address answers: status and body.
///
/// # Panics
///
/// When it does not answer.
#[track_caller]
#[must_use]
pub fn http(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("the daemon listens");
    write!(stream, "GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        .expect("it can be written to");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers in text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.expect("a status"), body.to_owned())
}

/// All rows of a metric: labels and value.
///
/// # Panics
///
/// When the address does not answer.
#[track_caller]
#[must_use]
pub fn metrics(address: SocketAddr, name: &str) -> Vec<(String, f64)> {
    let (_, text) = http(address, "/metrics");
    let rows = text.lines().filter(|line| !line.starts_with('#'));
    rows.filter_map(|line| {
        let (labelled, value) = line.rsplit_once(' ')?;
        let (metric, labels) = labelled.split_once('{').unwrap_or((labelled, ""));
        (metric == name).then(|| (labels.to_owned(), value.parse().unwrap_or(f64::NAN)))
    })
    .collect()
}

/// The value of the row of a metric that has all of these labels.
///
/// # Panics
///
/// When there is no such row.
#[track_caller]
#[must_use]
pub fn row(address: SocketAddr, name: &str, labels: &[(&str, &str)]) -> f64 {
    let rows = metrics(address, name);
    let has = |row: &str| {
        labels.iter().all(|(label, value)| row.contains(&format!("{label}=\"{value}\"")))
    };
    let found = rows.iter().find(|(row, _)| has(row));
    found.unwrap_or_else(|| panic!("{name} has no {labels:?}: {rows:?}")).1
}
