//! One write switches a workload from one allow-list to the next.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use agentguard_common::{Mode, Protocol};

use crate::fixture::{Fixture, to};

const FLIPS: usize = 1000;
/// Generations that are kept beside the one in force; the oldest is out of use by then.
const KEPT: usize = 30;

#[test]
fn no_verdict_is_wrong_while_generations_flip() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let permitted = server.local_addr().unwrap();
    let denied: SocketAddr = "127.0.0.1:9".parse().unwrap();
    let elsewhere: [SocketAddr; 2] =
        ["127.0.0.2:53".parse().unwrap(), "127.0.0.0:443".parse().unwrap()];
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[to(Protocol::Udp, permitted)]);
    worker.tell(&format!("hammer {permitted} {denied} 4000"));
    let mut kept = VecDeque::new();
    for flip in 0..FLIPS {
        let permits =
            [to(Protocol::Udp, permitted), to(Protocol::Udp, elsewhere[flip % elsewhere.len()])];
        kept.push_back(fixture.permit(Mode::Enforce, &permits));
        if kept.len() > KEPT
            && let Some(old) = kept.pop_front()
        {
            fixture.datapath.drop_allowlist(&old).unwrap();
        }
        thread::sleep(Duration::from_millis(2));
    }
    let answer = worker.answer();
    let (wrong, all) = answer.split_once(" of ").unwrap();
    assert_eq!(wrong, "0", "{answer}");
    assert!(all.parse::<u64>().unwrap() > 10_000, "{answer}");
}
