//! An idle accelerated connection costs nothing: no process of either end uses CPU time.

mod common;

use common::{Lab, Path, SOON, ticks, v4, wait_until};
use std::time::{Duration, Instant};

const WATCHED: Duration = Duration::from_secs(3);

/// The processes' clock ticks over [`WATCHED`]: the one thing here that time itself must pass for.
fn rise(what: &[(String, u32)]) -> Vec<(String, u64)> {
    let before: Vec<u64> = what.iter().map(|(_, pid)| ticks(*pid)).collect();
    std::thread::sleep(WATCHED);
    what.iter().zip(before).map(|((name, pid), before)| (name.clone(), ticks(*pid) - before)).collect()
}

fn idle(path: Path) {
    let lab = Lab::up_for(&format!("idle-{path:?}"), path);
    let host = v4(path.server(), 6379).ip().to_string();
    // redis-server looks after its own affairs ten times a second: the lowest it can be told is once.
    let server = [
        "redis-server",
        "--bind",
        &host,
        "--save",
        "",
        "--protected-mode",
        "no",
        "--hz",
        "1",
        "--dynamic-hz",
        "no",
    ];
    let server = lab.serve(path.server(), 6379, &server);
    let mut client = lab.run("a", &["redis-cli", "-h", &host]);
    // An upgrade goes on at the programs' own calls, so they go on calling until it is done.
    wait_until(SOON, "the connection is on its lane", || {
        client.tell("set key value");
        let lanes = (path.lane(), path.lane());
        lab.ss("a").iter().any(|line| line.pid() == client.pid() && line.lanes() == lanes)
    });

    let mut watched: Vec<_> =
        lab.daemons().into_iter().map(|(r, n, pid)| (format!("{r} {n}"), pid)).collect();
    assert_eq!(watched.len(), 7, "{watched:?}");
    watched.push(("redis-server".into(), server.pid()));
    watched.push(("redis-cli".into(), client.pid()));
    // Whatever ends the upgrade may still be under way: the first quiet stretch counts.
    let end = Instant::now() + Duration::from_secs(12);
    loop {
        let rose = rise(&watched);
        if rose.iter().all(|(_, ticks)| *ticks <= 1) {
            break;
        }
        assert!(Instant::now() < end, "clock ticks used in {WATCHED:?}: {rose:?}");
    }
    lab.on_lane("a", client.pid(), 1, path.lane());
    client.tell("get key");
    client.end_input();
    assert_eq!(client.ok().lines().last(), Some("value"));
}

#[test]
fn an_idle_connection_same_host() {
    idle(Path::SameHost);
}

#[test]
fn an_idle_connection_cross_host() {
    idle(Path::CrossHost);
}

#[test]
fn an_idle_connection_relayed() {
    idle(Path::Relayed);
}
