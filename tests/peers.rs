//! A program with vsocket and one without: they talk over kernel TCP, at its speed, and `vsocket ss` says why.

mod common;

use common::{Lab, Path, SOON, v4, wait_until};

const PORT: u16 = 7000;

/// One end accelerated, the other plain: everything arrives, and nothing is upgraded.
fn mixed(test: &str, client: &str, server: &str, path: Path) {
    let lab = Lab::up(&format!("peers-{test}-{}", path.lane()));
    let address = v4(path.server(), PORT);
    let serving = lab.stream_server(server, path.server(), address, &[]);
    let before = lab.before(path);
    lab.stream(client, "a", "connect", address, &["--bytes", "100000000"]).report();
    wait_until(SOON, "the server has reported too", || !serving.reports().is_empty());
    assert!(serving.reports()[0]["error"].is_null());

    let running = lab.stream(client, "a", "echo", address, &["--until-eof", "--every", "1"]);
    let (guest, pid) = if client == "run" { ("a", running.pid()) } else { (path.server(), serving.pid()) };
    wait_until(SOON, "ss says that the peer has not opened its end", || {
        let mine = lab.ss(guest).into_iter().filter(|line| line.pid() == pid);
        mine.into_iter().any(|line| line.reason() == "peer-not-open" && line.lanes() == ("tcp", "tcp"))
    });
    running.finish();
    before.none_upgraded();
    assert!(lab.stat(guest).declined("peer-not-open") >= 1);
}

#[test]
fn accelerated_client_of_a_plain_server() {
    for path in [Path::SameHost, Path::CrossHost] {
        mixed("client", "run", "exec", path);
    }
}

#[test]
fn plain_client_of_an_accelerated_server() {
    for path in [Path::SameHost, Path::CrossHost] {
        mixed("server", "exec", "run", path);
    }
}

/// Kernel TCP is not slower for having been offered an upgrade. The best of several turns each, as the machine has
/// other things to do too; the bound is wide for the same reason.
#[test]
fn mixed_peers_have_the_kernels_speed() {
    let lab = Lab::up("peers-speed");
    let address = v4("b", PORT);
    let server = lab.stream_server("exec", "b", address, &[]);
    let seconds = |verb: &str| {
        let report = lab.stream(verb, "a", "connect", address, &["--bytes", "200000000"]).report();
        report["seconds"].as_f64().expect("seconds")
    };
    let (mut plain, mut mixed) = (f64::MAX, f64::MAX);
    for _ in 0..4 {
        plain = plain.min(seconds("exec"));
        mixed = mixed.min(seconds("run"));
    }
    // Only a gross loss shows here: speed is measured in benchmarks.
    assert!(mixed < plain * 3.0, "{mixed} s with one accelerated end, {plain} s without");
    drop(server);
}
