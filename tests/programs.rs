//! Unmodified programs run accelerated: each connection worth it is on its lane, and so are the bytes.

mod common;

use common::{Before, Lab, Path, Program, SOON, v4, wait_until};
use serde_json::Value;

const PATHS: [Path; 2] = [Path::SameHost, Path::CrossHost];

fn redis(lab: &Lab, guest: &str) -> Program {
    let address = v4(guest, 6379).ip().to_string();
    let options =
        ["redis-server", "--bind", &address, "--save", "", "--appendonly", "no", "--protected-mode", "no"];
    lab.serve(guest, 6379, &options)
}

/// Requests a second, by test.
fn benchmark(lab: &Lab, path: Path, options: &[&str]) -> Vec<(String, f64)> {
    let host = v4(path.server(), 6379).ip().to_string();
    let command = [&["redis-benchmark", "-h", &host, "--csv"], options].concat();
    let ended = lab.run("a", &command).ends(common::PROGRAM);
    // Without keep-alive it warns, in any case.
    let err: String = ended.err.lines().filter(|line| !line.starts_with("WARNING: Keepalive")).collect();
    let out = ended.out.clone();
    ended.ok();
    assert!(!out.contains("rror") && err.is_empty(), "redis-benchmark: {out}{err}");
    let cell = |cell: &str| cell.trim_matches('"').to_owned();
    let rows = out.lines().skip(1).map(|line| line.split(',').map(cell).collect::<Vec<_>>());
    rows.map(|row| (row[0].clone(), row[1].parse().expect("requests a second"))).collect()
}

fn redis_benchmark(test: &str, connections: u64, options: &[&str], least_bytes: u64) {
    for path in PATHS {
        let lab = Lab::up(&format!("programs-{test}-{}", path.lane()));
        let _server = redis(&lab, path.server());
        let before = lab.before(path);
        let rates = benchmark(&lab, path, options);
        assert!(!rates.is_empty() && rates.iter().all(|(_, rate)| *rate > 0.0), "{rates:?}");
        proof(&before, connections, least_bytes);
    }
}

fn proof(before: &Before<'_>, connections: u64, least_bytes: u64) {
    before.upgraded(connections);
    before.on_lane(least_bytes, 0.99);
}

// A GET of redis-benchmark is 36 bytes and its answer at least 5 ("$-1\r\n").

#[test]
fn redis_get_and_set_with_fifty_connections() {
    redis_benchmark("redis-c50", 100, &["-t", "set,get", "-n", "600000", "-c", "50"], 600_000 * 2 * 36);
}

#[test]
fn redis_get_with_one_connection() {
    redis_benchmark("redis-c1", 1, &["-t", "get", "-n", "100000", "-c", "1"], 99_000 * 41);
}

#[test]
fn redis_get_pipelined() {
    let options = ["-t", "get", "-n", "6000000", "-c", "50", "-P", "16"];
    redis_benchmark("redis-p16", 50, &options, 5_940_000 * 41);
}

/// A new connection for each request: none is worth an upgrade, and all requests are answered.
#[test]
fn redis_with_a_connection_per_request_stays_on_tcp() {
    for path in PATHS {
        let lab = Lab::up(&format!("programs-redis-k0-{}", path.lane()));
        let _server = redis(&lab, path.server());
        let before = lab.before(path);
        benchmark(&lab, path, &["-t", "get", "-n", "20000", "-c", "50", "-k", "0"]);
        before.none_upgraded();
    }
}

#[test]
fn iperf3_one_stream() {
    for path in PATHS {
        let lab = Lab::up(&format!("programs-iperf3-{}", path.lane()));
        let address = v4(path.server(), 5201).ip().to_string();
        let _server = lab.serve(path.server(), 5201, &["iperf3", "-s", "-B", &address]);
        for reverse in [&[][..], &["-R"]] {
            let before = lab.before(path);
            let command = [&["iperf3", "-c", &address, "-J", "-n", "8G"], reverse].concat();
            let result: Value = serde_json::from_str(&lab.run("a", &command).ok()).expect("JSON of iperf3");
            let bytes = |way: &str| result["end"][way]["bytes"].as_u64().expect("bytes moved");
            assert!(result["error"].is_null() && bytes("sum_received") >= 7 << 30, "{result}");
            proof(&before, 1, bytes("sum_received") / 100 * 99);
        }
    }
}

#[test]
fn iperf3_four_streams_both_ways() {
    for path in PATHS {
        let lab = Lab::up(&format!("programs-iperf3-bidir-{}", path.lane()));
        let address = v4(path.server(), 5201).ip().to_string();
        let _server = lab.serve(path.server(), 5201, &["iperf3", "-s", "-B", &address]);
        let before = lab.before(path);
        let command = ["iperf3", "-c", &address, "-J", "-t", "2", "-P", "4", "--bidir"];
        let result: Value = serde_json::from_str(&lab.run("a", &command).ok()).expect("JSON of iperf3");
        assert!(result["error"].is_null(), "{result}");
        before.upgraded(8);
    }
}

#[test]
fn sockperf_ping_pong() {
    for path in PATHS {
        let lab = Lab::up(&format!("programs-sockperf-{}", path.lane()));
        let address = v4(path.server(), 6401).ip().to_string();
        let _server =
            lab.serve(path.server(), 6401, &["sockperf", "server", "--tcp", "-i", &address, "-p", "6401"]);
        let before = lab.before(path);
        let options = ["--tcp", "--msg-size", "64", "--time", "5", "--mps", "400000"];
        let client = [&["sockperf", "ping-pong", "-i", &address, "-p", "6401"][..], &options].concat();
        let out = lab.run("a", &client).ok();
        assert!(out.contains("percentile 50.0"), "{out}");
        assert!(out.contains("# dropped messages = 0; # duplicated messages = 0"), "{out}");
        // How many round trips fit into the seconds is the machine's affair.
        proof(&before, 1, 100_000);
    }
}

/// A connection that has been on a lane is passed to another process: it comes to a lane there as well, as the agent knows what its
/// stays have left behind. Another agent does not, and leaves it on TCP.
#[test]
fn a_connection_that_is_passed_on() {
    let file = |name| format!("{}/tests/programs/{name}", env!("CARGO_MANIFEST_DIR"));
    let (passing, asking) = (file("passing.py"), file("handover.py"));
    for (path, replaced) in [(PATHS[0], false), (PATHS[1], false), (PATHS[0], true), (PATHS[1], true)] {
        let lab = Lab::up(&format!("programs-passing-{}", path.lane()));
        let (guest, host) = (path.server(), v4(path.server(), 7000).ip().to_string());
        let go = lab.state().join("go").display().to_string();
        let serve = ["python3", &passing, "serve", &host, "7000", "100", &go];
        let mut server = lab.serve(guest, 7000, &serve);
        let rounds = if replaced { "6000" } else { "900" };
        let client = lab.start("run", "a", &["python3", &asking, "ask", &host, "7000", rounds]);
        server.prints("passed");
        assert_eq!(lab.stat(guest).connections("upgraded_total"), 1, "it was on its lane before");
        let replace = || {
            lab.daemon("kill", "agent", guest);
            lab.daemon("start", "agent", guest);
        };
        let stays = || wait_until(SOON, "it stays on TCP", || lab.stat(guest).declined("untrackable") > 0);
        if replaced {
            replace();
        }
        std::fs::write(&go, "").expect("the worker's sign");
        if replaced {
            stays();
            // The worker brings it to the next agent, which must not take it for one without a past.
            replace();
            stays();
        }
        assert_eq!(client.ok(), format!("answered {rounds}\n"));
        let stat = lab.stat(guest);
        assert_eq!(stat.connections("upgraded_total"), if replaced { 0 } else { 2 }, "{}", stat.0);
    }
}

/// A fork copies a connection that nobody has opened so far. While both processes have it neither may put it on a lane, for
/// the other would go on at the kernel's socket; the one that is left may, whoever has moved its bytes.
#[test]
fn a_connection_that_a_fork_has_copied() {
    let script = format!("{}/tests/programs/handover.py", env!("CARGO_MANIFEST_DIR"));
    for path in PATHS {
        let lab = Lab::up(&format!("programs-handover-{}", path.lane()));
        let host = v4(path.server(), 7000).ip().to_string();
        for rounds in ["0", "12", "300"] {
            let serve = ["python3", &script, "serve", &host, "7000", rounds];
            let server = lab.serve(path.server(), 7000, &serve);
            let before = lab.before(path);
            let out = lab.run("a", &["python3", &script, "ask", &host, "7000", "600"]).ok();
            assert_eq!(out, "answered 600\n", "after {rounds} of them by a child");
            before.upgraded(1);
            drop(server);
        }
    }
}
