//! What a daemon answers at its metrics address.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    ops::Range,
    process,
    sync::atomic::{AtomicU16, Ordering},
};

/// Ports that the kernel gives to nobody who did not ask for them: below the range that it chooses
/// from (`net.ipv4.ip_local_port_range`, 32768 to 60999 by default).
const NEVER_CHOSEN: Range<u16> = 20_000..32_000;

/// An address of loopback that nothing listens on, and that nothing will which lets the kernel
/// choose its port: it is still free when a daemon is started a second time.
///
/// # Panics
///
/// When loopback is down.
#[must_use]
pub fn unused_address() -> SocketAddr {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let count = u32::from(NEVER_CHOSEN.end - NEVER_CHOSEN.start);
    // Test programs that run side by side begin at different places.
    let first = process::id().wrapping_mul(97);
    let mut tried = (0..count).map(|_| {
        let next = u32::from(TAKEN.fetch_add(1, Ordering::Relaxed));
        let offset = u16::try_from(first.wrapping_add(next) % count).expect("the range is in u16");
        SocketAddr::from((Ipv4Addr::LOCALHOST, NEVER_CHOSEN.start + offset))
    });
    tried.find(|address| TcpListener::bind(address).is_ok()).expect("loopback is up")
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
