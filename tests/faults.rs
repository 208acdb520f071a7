//! Parts that die, stop or are not there: the programs' bytes go on, at the exact byte, and return to their lane.

mod common;

use common::{Lab, PROGRAM, Path, Program, SOON, v4, wait_until};
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const PORT: u16 = 7000;

// ---------------------------------------------------------------- what runs meanwhile

/// Streams of known bytes, ping-pong of known bytes, and redis-benchmark over and over, all accelerated.
struct Load<'a> {
    lab: &'a Lab,
    path: Path,
    server: Program,
    _redis: Program,
    streams: Vec<Program>,
    benchmarks: Program,
    enough: PathBuf,
}

impl<'a> Load<'a> {
    fn new(lab: &'a Lab, path: Path) -> Self {
        let guest = path.server();
        let server = lab.stream_server("run", guest, v4(guest, PORT), &["--pace", "100000000"]);
        let address = v4(guest, 6379).ip().to_string();
        let redis = ["redis-server", "--bind", &address, "--save", "", "--protected-mode", "no"];
        let redis = lab.serve(guest, 6379, &redis);
        let connect = |mode, options: &[&str]| lab.stream("run", "a", mode, v4(guest, PORT), options);
        let streams = vec![
            connect("connect", &["--until-eof", "--seed", "11", "--pace", "100000000"]),
            connect("connect", &["--until-eof", "--seed", "22", "--pace", "100000000", "--epoll"]),
            connect("echo", &["--until-eof", "--seed", "33", "--size", "1000"]),
        ];
        let enough = lab.state().join("enough");
        let again = format!(
            "until [ -e {} ]; do redis-benchmark -h {address} -t get -n 20000 -c 10 --csv || exit; done",
            enough.display()
        );
        let benchmarks = lab.run("a", &["sh", "-c", &again]);
        let mut load = Self { lab, path, server, _redis: redis, streams, benchmarks, enough };
        load.is_on_lane();
        load.benchmarks.prints("\"GET\"");
        load
    }

    /// Waits until each stream is on its lane, both ways.
    fn is_on_lane(&self) {
        for stream in &self.streams {
            self.lab.on_lane("a", stream.pid(), 1, self.path.lane());
        }
    }

    /// Waits until each stream is on kernel TCP, both ways.
    fn is_on_tcp(&self) {
        for stream in &self.streams {
            self.lab.on_lane("a", stream.pid(), 1, "tcp");
        }
    }

    /// Waits until so many bytes more have gone out over a lane.
    fn moves(&self, lane: &str, bytes: u64) {
        let before = self.lab.stat("a").bytes(lane, "tx");
        wait_until(SOON, &format!("{bytes} bytes more on {lane}"), || {
            self.lab.stat("a").bytes(lane, "tx") >= before + bytes
        });
    }

    /// Waits until the two streams have moved so many bytes each way, over whatever lane.
    fn has_moved(&self, bytes: u64) {
        let moved = |pid| {
            let line = self.lab.ss("a").into_iter().find(|l| l.pid() == pid);
            line.map_or(0, |l| l.bytes("tx").min(l.bytes("rx")))
        };
        let enough = || self.streams[..2].iter().all(|s| moved(s.pid()) >= bytes);
        wait_until(PROGRAM, &format!("{bytes} bytes each way"), enough);
    }

    /// Ends the streams: everything that was sent has arrived.
    fn finish(mut self) {
        self.is_served();
        std::fs::write(&self.enough, "").expect("the lab's directory");
        self.benchmarks.ends(PROGRAM).ok();
        for mut stream in self.streams {
            assert!(stream.runs(), "a stream has ended by itself: {}{}", stream.out(), stream.err());
            stream.finish();
        }
        wait_until(SOON, "the server has seen the end of every stream", || self.server.reports().len() >= 3);
        assert_eq!(self.server.err(), "");
        assert!(self.server.reports().iter().all(|r| r["error"].is_null()), "{:?}", self.server.reports());
    }

    /// Each request of every benchmark so far was answered.
    fn is_served(&mut self) {
        let so_far = self.benchmarks.out().matches("\"GET\"").count();
        let end = Instant::now() + PROGRAM;
        while self.benchmarks.out().matches("\"GET\"").count() == so_far {
            assert!(self.benchmarks.runs() && Instant::now() < end, "redis-benchmark has stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
        let (out, err) = (self.benchmarks.out(), self.benchmarks.err());
        assert!(err.is_empty() && !out.contains("rror"), "redis-benchmark: {out}{err}");
    }
}

// ---------------------------------------------------------------- ten in a row

/// Backends die, alone and together, and a vport is drained, ten in a row.
fn ten_in_a_row(path: Path) {
    let lab = Lab::up(&format!("faults-ten-{}", path.lane()));
    let mut load = Load::new(&lab, path);
    let faults = ["h1", "h2", "drain", "both", "h1", "drain", "h2", "both", "drain", "h1"];
    for (round, fault) in faults.into_iter().enumerate() {
        let tcp = lab.stat("a").bytes("tcp", "tx");
        eprintln!("round {round}: {fault}");
        if fault == "drain" {
            lab.must(&["drain", path.server()]);
            load.is_on_tcp();
            let reason =
                |pid| lab.ss("a").into_iter().find(|l| l.pid() == pid).map(|l| l.reason().to_owned());
            let drained =
                |r: Option<String>| matches!(r.as_deref(), Some("drained" | "peer-left" | "peer-not-open"));
            // An end that was not drained itself asks again, and hears in a moment why not.
            wait_until(SOON, "ss says that they were drained", || {
                load.streams.iter().all(|s| drained(reason(s.pid())))
            });
            load.moves("tcp", 1_000_000);
            lab.must(&["undrain", path.server()]);
        } else {
            let hosts = if fault == "both" { vec!["h1", "h2"] } else { vec![fault] };
            for host in &hosts {
                lab.daemon("kill", "backend", host);
            }
            if path == Path::CrossHost {
                load.moves("tcp", 1_000_000);
            }
            for host in &hosts {
                lab.daemon("start", "backend", host);
            }
        }
        load.is_on_lane();
        load.moves(path.lane(), 5_000_000);
        load.is_served();
        if path == Path::CrossHost || fault == "drain" {
            assert!(lab.stat("a").bytes("tcp", "tx") > tcp, "nothing went over TCP in round {round}");
        }
    }
    load.has_moved(1 << 30);
    load.finish();
}

#[test]
fn backends_die_ten_times_same_host() {
    ten_in_a_row(Path::SameHost);
}

#[test]
fn backends_die_ten_times_cross_host() {
    ten_in_a_row(Path::CrossHost);
}

/// A relay lives and dies with its backend: the programs go on over TCP, and return when there is one again.
#[test]
fn backends_die_under_a_relay() {
    let path = Path::Relayed;
    let lab = Lab::up_for("faults-relay", path);
    let mut load = Load::new(&lab, path);
    for fault in ["kill", "drain", "kill", "stop", "kill"] {
        eprintln!("{fault}");
        if fault == "drain" {
            lab.must(&["drain", "b"]);
            load.is_on_tcp();
        } else {
            lab.daemon(fault, "backend", "h1");
        }
        load.moves("tcp", 1_000_000);
        if fault == "drain" {
            lab.must(&["undrain", "b"]);
        } else {
            lab.daemon("start", "backend", "h1");
        }
        load.is_on_lane();
        load.moves(path.lane(), 5_000_000);
        load.is_served();
        let lanes = &lab.host_stat("h1")["lanes"];
        assert!(
            lanes["relay"].as_u64() >= Some(3) && lanes["direct"] == 0 && lanes["fabric"] == 0,
            "{lanes}"
        );
    }
    load.has_moved(1 << 28);
    load.finish();
}

// ---------------------------------------------------------------- stopped

/// Not dead, not answering: the liveness bound is half a second after a look of a tenth.
#[test]
fn a_stopped_backend_cross_host() {
    for host in ["h1", "h2"] {
        let lab = Lab::up(&format!("faults-stopped-fabric-{host}"));
        let load = Load::new(&lab, Path::CrossHost);
        lab.daemon("pause", "backend", host);
        let stopped = Instant::now();
        load.is_on_tcp();
        let took = stopped.elapsed();
        assert!(took < Duration::from_secs(3), "on TCP only after {took:?}");
        load.moves("tcp", 5_000_000);
        lab.daemon("cont", "backend", host);
        load.is_on_lane();
        load.moves("fabric", 5_000_000);
        load.finish();
    }
}

#[test]
fn a_stopped_backend_under_a_relay() {
    let lab = Lab::up_for("faults-stopped-relay", Path::Relayed);
    let load = Load::new(&lab, Path::Relayed);
    lab.daemon("pause", "backend", "h1");
    let stopped = Instant::now();
    load.is_on_tcp();
    let took = stopped.elapsed();
    assert!(took < Duration::from_secs(3), "on TCP only after {took:?}");
    load.moves("tcp", 5_000_000);
    lab.daemon("cont", "backend", "h1");
    load.is_on_lane();
    load.moves("fabric", 5_000_000);
    load.finish();
}

/// A direct lane goes on without its backend; a new connection waits for nobody.
#[test]
fn a_stopped_backend_same_host() {
    let lab = Lab::up("faults-stopped-direct");
    let load = Load::new(&lab, Path::SameHost);
    lab.daemon("pause", "backend", "h1");
    load.moves("direct", 50_000_000);
    lab.stream("run", "a", "connect", v4("b", PORT), &["--bytes", "5000000"]).report();
    lab.daemon("cont", "backend", "h1");
    load.moves("direct", 50_000_000);
    load.is_on_lane();
    load.finish();
}

// ---------------------------------------------------------------- agents

/// Whether a program has lost something without being told.
fn silent_loss(report: &Value) -> bool {
    let error = report["error"].as_str().unwrap_or_default();
    report["end"] == "corrupt" || error.contains("trailer")
}

/// Its connections may be reset, which the programs then hear; nothing is lost or doubled without a word.
fn agent_dies(guest_of: fn(Path) -> &'static str) {
    for path in [Path::SameHost, Path::CrossHost, Path::Relayed] {
        let guest = guest_of(path);
        let lab = Lab::up_for(&format!("faults-agent-{guest}-{path:?}"), path);
        let address = v4(path.server(), PORT);
        let server = lab.stream_server("run", path.server(), address, &[]);
        let options = ["--until-eof", "--pace", "100000000"];
        let mut client = lab.stream("run", "a", "connect", address, &options);
        lab.on_lane("a", client.pid(), 1, path.lane());
        lab.daemon("kill", "agent", guest);
        client.end_input();
        let ended = client.ends(PROGRAM);
        wait_until(SOON, "the server has seen the end", || !server.reports().is_empty());
        let here: Value = serde_json::from_str(&ended.out).expect("the client's report");
        for report in [&here, &server.reports()[0]] {
            assert!(!silent_loss(report), "{report}");
        }
        lab.daemon("start", "agent", guest);
        // Old programs go on as they can; new ones are accelerated again.
        drop(server);
        let server = lab.stream_server("run", path.server(), address, &["--once"]);
        let before = lab.before(path);
        let client = lab.stream("run", "a", "connect", address, &options);
        lab.on_lane("a", client.pid(), 1, path.lane());
        client.finish();
        server.report();
        before.upgraded(1);
    }
}

#[test]
fn the_clients_agent_dies() {
    agent_dies(|_| "a");
}

#[test]
fn the_servers_agent_dies() {
    agent_dies(Path::server);
}

/// An agent is killed, or ends, and another is started: each connection goes on meanwhile, and comes back to its lane.
fn agent_is_replaced(guest_of: fn(Path) -> &'static str) {
    for path in [Path::SameHost, Path::CrossHost, Path::Relayed] {
        let guest = guest_of(path);
        let far = if guest == "a" { path.server() } else { "a" };
        let lab = Lab::up_for(&format!("faults-replaced-{guest}-{path:?}"), path);
        let mut load = Load::new(&lab, path);
        for end in ["kill", "stop"] {
            eprintln!("{path:?} {end}");
            lab.daemon(end, "agent", guest);
            let before = lab.stat(far).bytes("tcp", "tx");
            wait_until(SOON, "the far end's bytes are on TCP", || {
                lab.stat(far).bytes("tcp", "tx") > before + 1_000_000
            });
            lab.daemon("start", "agent", guest);
            load.is_on_lane();
            let new = lab.stat(guest);
            // Those of the streams, if none of the benchmark's.
            assert!(new.connections("upgraded_total") >= 3, "{new:?}");
            wait_until(SOON, "bytes on the lane by the new agent", || {
                lab.stat(guest).bytes(path.lane(), "tx") > new.bytes(path.lane(), "tx") + 5_000_000
            });
            load.is_served();
        }
        load.has_moved(1 << 28);
        load.finish();
    }
}

#[test]
fn the_clients_agent_is_replaced() {
    agent_is_replaced(|_| "a");
}

#[test]
fn the_servers_agent_is_replaced() {
    agent_is_replaced(Path::server);
}

/// Who never sleeps hears of its agent's end as well: by what it tells it of a lane that is left, or on TCP by looking.
#[test]
fn the_agent_of_who_never_sleeps_is_replaced() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("faults-sleepless-{}", path.lane()));
        let address = v4(path.server(), PORT);
        let server = lab.stream_server("run", path.server(), address, &["--once"]);
        let client = lab.stream("run", "a", "echo", address, &["--until-eof", "--spin"]);
        let is_on = |lane| lab.on_lane("a", client.pid(), 1, lane);
        let replace = || {
            lab.daemon("kill", "agent", "a");
            lab.daemon("start", "agent", "a");
        };
        is_on(path.lane());
        replace();
        is_on(path.lane());
        if path == Path::CrossHost {
            lab.daemon("stop", "backend", "h1");
            is_on("tcp");
            replace();
            is_on("tcp");
            lab.daemon("start", "backend", "h1");
            is_on("fabric");
        }
        client.finish();
        server.report();
    }
}

/// So does who only sends: nobody tells it by its ring to leave.
#[test]
fn the_agent_of_who_only_sends_is_replaced() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("faults-sender-{}", path.lane()));
        let address = v4(path.server(), PORT);
        let server = lab.stream_server("run", path.server(), address, &["--once"]);
        let options = ["--one-way", "--until-eof", "--pace", "10000000", "--largest", "1000"];
        let client = lab.stream("run", "a", "connect", address, &options);
        let sends_on_lane = || {
            wait_until(SOON, "what is sent goes by the lane", || {
                lab.ss("a").iter().any(|l| l.pid() == client.pid() && l.lanes().0 == path.lane())
            });
        };
        sends_on_lane();
        lab.daemon("kill", "agent", "a");
        lab.daemon("start", "agent", "a");
        sends_on_lane();
        client.finish();
        server.report();
    }
}

// ---------------------------------------------------------------- programs

/// What a program had sent when it was killed arrives, and then the end of the stream.
#[test]
fn a_killed_program_has_sent_what_it_sent() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("faults-program-{}", path.lane()));
        let address = v4(path.server(), PORT);
        let server = lab.stream_server("run", path.server(), address, &[]);
        let before = lab.before(path);
        for round in 1..=5 {
            let bytes = 30_000_000 + 123_457 * round;
            let options = ["--no-trailer", "--bytes", &bytes.to_string()];
            let mut client = lab.stream("run", "a", "connect", address, &options);
            client.prints("sent");
            client.kill();
            wait_until(SOON, "the server sees the end", || server.reports().len() >= round as usize);
            let report = &server.reports()[round as usize - 1];
            assert_eq!((report["end"].as_str(), report["received"].as_u64()), (Some("eof"), Some(bytes)));
            assert!(report["error"].is_null(), "{report}");
        }
        before.upgraded(5);
    }
}

/// Killed in the middle of its calls: the peer gets at least what those calls had taken, and then the end.
#[test]
fn a_program_killed_while_it_sends() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("faults-program-middle-{}", path.lane()));
        let address = v4(path.server(), PORT);
        let server = lab.stream_server("run", path.server(), address, &[]);
        for round in 1..=5 {
            let file = lab.state().join("taken");
            let file = file.to_str().expect("a path in UTF-8");
            let options = ["--no-trailer", "--bytes", "1000000000000", "--report", file];
            let mut client = lab.stream("run", "a", "connect", address, &options);
            wait_until(SOON, "the client's stream is on its lane", || {
                lab.ss("a").iter().any(|l| l.pid() == client.pid() && l.lanes().0 == path.lane())
            });
            client.kill();
            let taken = std::fs::read(file).expect("what write() had taken");
            let taken = u64::from_le_bytes(taken.try_into().expect("eight bytes"));
            wait_until(SOON, "the server sees the end", || server.reports().len() >= round);
            let report = &server.reports()[round - 1];
            assert!(report["error"].is_null() && report["end"] == "eof", "{report}");
            assert!(report["received"].as_u64() >= Some(taken), "{taken} were taken: {report}");
        }
    }
}

/// Who talks to a killed program hears of it.
#[test]
fn a_killed_server_is_noticed() {
    for path in [Path::SameHost, Path::CrossHost] {
        let lab = Lab::up(&format!("faults-server-{}", path.lane()));
        let address = v4(path.server(), PORT);
        for options in [&[][..], &["--epoll"]] {
            let mut server = lab.stream_server("run", path.server(), address, &[]);
            let options = [&["--until-eof"], options].concat();
            let client = lab.stream("run", "a", "connect", address, &options);
            lab.on_lane("a", client.pid(), 1, path.lane());
            server.kill();
            let ended = client.ends(SOON);
            assert!(!ended.status.success(), "{}", ended.out);
            let report: Value = serde_json::from_str(&ended.out).expect("a report");
            assert!(["reset", "pipe"].contains(&report["end"].as_str().unwrap_or_default()), "{report}");
        }
        // And an idle one, that only reads.
        let mut server = lab.stream_server("run", path.server(), address, &[]);
        let options = ["--rounds", "1000", "--idle-after", "500"];
        let mut client = lab.stream("run", "a", "echo", address, &options);
        client.prints("idle");
        server.kill();
        client.end_input();
        assert!(!client.ends(SOON).status.success());
    }
}

// ---------------------------------------------------------------- absent

fn works_on_tcp(lab: &Lab, path: Path) {
    let address = v4(path.server(), PORT);
    let server = lab.stream_server("run", path.server(), address, &["--once"]);
    let client = lab.stream("run", "a", "connect", address, &["--bytes", "20000000"]);
    let ended = client.ends(PROGRAM);
    assert_eq!(ended.err, "");
    ended.ok();
    server.report();
}

#[test]
fn no_backend_from_the_start() {
    let lab = Lab::up("faults-no-backend");
    for host in ["h1", "h2"] {
        lab.daemon("stop", "backend", host);
    }
    for path in [Path::SameHost, Path::CrossHost] {
        works_on_tcp(&lab, path);
    }
    let server = lab.stream_server("run", "b", v4("b", PORT), &[]);
    let mut client = lab.stream("run", "a", "echo", v4("b", PORT), &["--until-eof", "--every", "1"]);
    wait_until(SOON, "ss says why", || {
        lab.ss("a").iter().any(|l| l.pid() == client.pid() && l.reason() == "no-backend")
    });
    // When the backend comes, the connection is upgraded.
    lab.daemon("start", "backend", "h1");
    lab.on_lane("a", client.pid(), 1, "direct");
    assert!(client.runs());
    client.finish();
    drop(server);
}

#[test]
fn no_agent_from_the_start() {
    let lab = Lab::up("faults-no-agent");
    for guest in ["a", "b", "c"] {
        lab.daemon("stop", "agent", guest);
    }
    for path in [Path::SameHost, Path::CrossHost] {
        works_on_tcp(&lab, path);
    }
}

/// The parts go while the connection is below the threshold; then it moves its bytes.
#[test]
fn parts_that_go_before_the_upgrade() {
    for (role, name) in [("backend", "h1"), ("backend", "h2"), ("agent", "a"), ("agent", "c")] {
        let lab = Lab::up(&format!("faults-before-{role}-{name}"));
        let server = lab.stream_server("run", "c", v4("c", PORT), &["--once"]);
        let options = ["--bytes", "20000000", "--pause-after", "5000"];
        let mut client = lab.stream("run", "a", "connect", v4("c", PORT), &options);
        client.prints("paused");
        lab.daemon("kill", role, name);
        client.tell("on");
        let ended = client.ends(PROGRAM);
        assert_eq!(ended.err, "", "{role} {name}");
        ended.ok();
        server.report();
    }
}
