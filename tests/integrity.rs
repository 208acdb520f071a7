//! Streams of known bytes, both ways at once, in writes and reads of every size, while the connection moves from
//! kernel TCP to its lane: what arrives is what was sent.
//!
//! `VSOCKET_TEST_MIB` sets how much the two large transfers move each way (default 1024).

mod common;

use common::{Lab, Path, v4, v6};
use std::net::SocketAddr;

const PORT: u16 = 7000;

fn large() -> u64 {
    let mib = std::env::var("VSOCKET_TEST_MIB").map_or(1024, |v| v.parse().expect("VSOCKET_TEST_MIB: MiB"));
    mib << 20
}

/// One transfer each way between accelerated programs; digests equal at both ends, and the bytes were on the lane.
fn transfer(test: &str, path: Path, address: SocketAddr, bytes: u64, server: &[&str], client: &[&str]) {
    let lab = Lab::up(test);
    let server = lab.stream_server("run", path.server(), address, &[&["--once"], server].concat());
    let before = lab.before(path);
    let bytes_text = bytes.to_string();
    let options = [&["--bytes", &bytes_text, "--seed", "20261123"], client].concat();
    let here = lab.stream("run", "a", "connect", address, &options).report();
    let there = server.report();
    // Each compared what it received with the seed and with the sender's digest; this is for the record.
    for report in [&here, &there] {
        assert_eq!((report["sent"].as_u64(), report["received"].as_u64()), (Some(bytes), Some(bytes)));
    }
    assert_ne!(here["sha256"], there["sha256"], "the two streams are different ones");
    before.upgraded(1);
    // The upgrade takes some milliseconds, in which a stream moves some megabytes.
    before.on_lane(2 * bytes / 100 * 95, 0.95);
}

#[test]
fn a_gibibyte_each_way_same_host() {
    transfer("integrity-same-v4", Path::SameHost, v4("b", PORT), large(), &[], &[]);
}

#[test]
fn a_gibibyte_each_way_cross_host() {
    transfer("integrity-cross-v4", Path::CrossHost, v4("c", PORT), large(), &[], &[]);
}

#[test]
fn ipv6_same_host() {
    transfer("integrity-same-v6", Path::SameHost, v6("b", PORT), large() / 4, &[], &[]);
}

#[test]
fn ipv6_cross_host() {
    transfer("integrity-cross-v6", Path::CrossHost, v6("c", PORT), large() / 4, &[], &[]);
}

#[test]
fn event_loops_same_host() {
    transfer("integrity-same-epoll", Path::SameHost, v4("b", PORT), large() / 4, &["--epoll"], &["--epoll"]);
}

#[test]
fn event_loops_cross_host() {
    transfer(
        "integrity-cross-epoll",
        Path::CrossHost,
        v4("c", PORT),
        large() / 4,
        &["--epoll"],
        &["--epoll"],
    );
}

/// An IPv4 client of a socket that accepts on IPv6: both ends' tuples are the same one.
#[test]
fn mapped_addresses() {
    let lab = Lab::up("integrity-mapped");
    let server = lab.stream_server("run", "b", "[::]:7000".parse().unwrap(), &["--once"]);
    let before = lab.before(Path::SameHost);
    let client = lab.stream("run", "a", "connect", v4("b", PORT), &["--bytes", "100000000"]);
    client.report();
    server.report();
    before.upgraded(1);
}

/// Twenty connections at once, each its own stream.
#[test]
fn many_connections_do_not_mix() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("integrity-many-{}", path.lane()));
        let address = v4(path.server(), PORT);
        let server = lab.stream_server("run", path.server(), address, &[]);
        let before = lab.before(path);
        let clients: Vec<_> = (0..20)
            .map(|n| {
                let seed = (1000 + 10 * n).to_string();
                let mut options = vec!["--bytes", "8000000", "--seed", &seed];
                if n % 2 == 1 {
                    options.push("--epoll");
                }
                lab.stream("run", "a", "connect", address, &options)
            })
            .collect();
        for client in clients {
            client.report();
        }
        before.upgraded(10);
        let bad: Vec<_> = server.reports().into_iter().filter(|r| !r["error"].is_null()).collect();
        assert!(bad.is_empty(), "{bad:?}");
    }
}

/// The connection pauses below the threshold, where nobody thinks of upgrading it, and is then upgraded in mid-stream.
#[test]
fn a_pause_before_the_upgrade() {
    let lab = Lab::up("integrity-pause");
    let server = lab.stream_server("run", "c", v4("c", PORT), &["--once"]);
    let before = lab.before(Path::CrossHost);
    let options = ["--bytes", "50000000", "--pause-after", "1000"];
    let mut client = lab.stream("run", "a", "connect", v4("c", PORT), &options);
    client.prints("paused");
    before.none_upgraded();
    client.tell("on");
    client.report();
    server.report();
    before.upgraded(1);
}

/// One direction ends long before the other, which stays on its lane; and one that begins only then gets onto it.
#[test]
fn a_half_close_leaves_the_other_direction_on_its_lane() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("integrity-half-close-{}", path.lane()));
        let address = v4(path.server(), PORT);
        for server in [&["--pace", "100000000"][..], &["--answer-at-end"]] {
            let server = lab.stream_server("run", path.server(), address, &[&["--once"], server].concat());
            let before = lab.before(path);
            let options = ["--bytes", "100000000", "--pace", "400000000"];
            lab.stream("run", "a", "connect", address, &options).report();
            server.report();
            before.upgraded(1);
            // Before the upgrade a busy machine moves some of it; off its lane the other direction would be a third.
            before.on_lane(160_000_000, 0.8);
        }
    }
}
