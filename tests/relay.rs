//! Guests of one host that share no memory: unmodified programs on a relay, and the daemon's counters as proof that it
//! carried their bytes.

mod common;

use common::{Lab, Path, v4, v6, wait_until};
use std::net::SocketAddr;

const PATH: Path = Path::Relayed;

/// Bytes that the relays of a vport of h1 have carried, out and in.
fn relayed(lab: &Lab, guest: &str) -> u64 {
    let stat = lab.host_stat("h1");
    let vport = stat["vports"].as_array().expect("vports").iter().find(|v| v["name"] == guest);
    let vport = vport.unwrap_or_else(|| panic!("no vport {guest}: {stat}"));
    ["tx_bytes", "rx_bytes"].into_iter().map(|key| vport[key].as_u64().expect("a number")).sum()
}

/// A quarter of a GiB each way between accelerated programs; digests equal at both ends.
fn transfer(test: &str, address: SocketAddr, options: &[&str]) {
    const BYTES: u64 = 256 << 20;
    let lab = Lab::up_for(&format!("relay-{test}"), PATH);
    let server = lab.stream_server("run", "b", address, &[&["--once"], options].concat());
    let before = lab.before(PATH);
    let bytes = BYTES.to_string();
    let options = [&["--bytes", &bytes, "--seed", "20261126"], options].concat();
    let reports = [lab.stream("run", "a", "connect", address, &options).report(), server.report()];
    for report in &reports {
        assert_eq!((report["sent"].as_u64(), report["received"].as_u64()), (Some(BYTES), Some(BYTES)));
    }
    before.upgraded(1);
    // The upgrade takes some milliseconds, in which a stream moves some megabytes.
    before.on_lane(2 * BYTES / 100 * 85, 0.85);
    for guest in ["a", "b"] {
        let moved = relayed(&lab, guest);
        assert!(moved >= 2 * BYTES / 100 * 85, "{moved} bytes of {guest} were relayed");
    }
    let stat = lab.host_stat("h1");
    assert_eq!((&stat["drops"], &stat["lanes"]["direct"]), (&serde_json::json!({}), &0.into()));
    wait_until(common::SOON, "nothing is held", || lab.host_stat("h1")["stays"] == 0);
}

#[test]
fn a_stream_each_way() {
    transfer("v4", v4("b", 7000), &[]);
}

#[test]
fn ipv6() {
    transfer("v6", v6("b", 7000), &[]);
}

#[test]
fn event_loops() {
    transfer("epoll", v4("b", 7000), &["--epoll"]);
}

#[test]
fn many_connections_do_not_mix() {
    let lab = Lab::up_for("relay-many", PATH);
    let address = v4("b", 7000);
    let server = lab.stream_server("run", "b", address, &[]);
    let before = lab.before(PATH);
    let client = |n: u32| {
        let seed = (1000 + 10 * n).to_string();
        let mut options = vec!["--bytes", "8000000", "--seed", &seed];
        if n % 2 == 1 {
            options.push("--epoll");
        }
        lab.stream("run", "a", "connect", address, &options)
    };
    let clients: Vec<_> = (0..20).map(client).collect();
    for client in clients {
        client.report();
    }
    before.upgraded(10);
    let bad: Vec<_> = server.reports().into_iter().filter(|r| !r["error"].is_null()).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn redis_with_fifty_connections() {
    let lab = Lab::up_for("relay-redis", PATH);
    let address = v4("b", 6379).ip().to_string();
    let server = ["redis-server", "--bind", &address, "--save", "", "--protected-mode", "no"];
    let _server = lab.serve("b", 6379, &server);
    let before = lab.before(PATH);
    let command = ["redis-benchmark", "-h", &address, "-t", "set,get", "-n", "600000", "-c", "50", "--csv"];
    let out = lab.run("a", &command).ok();
    assert!(out.contains("\"GET\"") && !out.contains("rror"), "{out}");
    before.upgraded(100);
    // A GET is 36 bytes and its answer at least 5, a SET is longer.
    before.on_lane(600_000 * 2 * 36, 0.97);
    assert!(relayed(&lab, "a") >= 600_000 * 2 * 36);
}
