//! Bad input from every side: each case ends in a clear error or a counted, named drop, nothing panics, and a connection
//! that runs all the while stays on its lane. What each layer refuses in detail is shown by the crates' own tests; here
//! it is the built programs and their counters.

mod common;

use common::agent::{Directory, Fake, Prepared};
use common::{Lab, PROGRAM, Program, SOON, example, v4, wait_for, wait_until};
use rustix::event::{PollFd, PollFlags, poll};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;
use vsocket_frontend::carrier::Carrier;

/// A connection that has to survive.
struct Witness<'a> {
    lab: &'a Lab,
    client: Program,
    _server: Program,
}

impl<'a> Witness<'a> {
    /// Between d and e, over both backends.
    fn new(lab: &'a Lab) -> Self {
        let server = lab.stream_server("run", "e", v4("e", 7900), &["--once"]);
        let client = lab.stream("run", "d", "echo", v4("e", 7900), &["--until-eof", "--every", "1"]);
        let witness = Self { lab, client, _server: server };
        witness.is_on_its_lane();
        witness
    }

    fn is_on_its_lane(&self) {
        self.lab.on_lane("d", self.client.pid(), 1, "fabric");
    }

    /// It was not disturbed, and no daemon has panicked.
    fn ends_well(self) {
        self.is_on_its_lane();
        assert_eq!(self.client.finish()["error"], serde_json::Value::Null);
        let stat = self.lab.stat("d");
        assert!(stat.bytes("tcp", "tx") < stat.bytes("fabric", "tx"), "it left its lane: {}", stat.0);
        for (role, name, _) in self.lab.daemons() {
            assert!(!self.lab.log(&role, &name).contains("panicked"), "{role} {name}");
        }
        assert_eq!(self.lab.daemons().len(), 7, "all daemons run");
    }
}

const GOOD: &str = r#"host = "h1"
control = "h1.ctl"
[[vport]]
name = "a"
vni = 100
mac = "02:00:00:00:00:01"
addresses = ["198.51.100.1"]
socket = "a"
"#;

#[test]
fn a_malformed_configuration_is_refused_with_line_and_key() {
    let directory = Directory::new();
    let table = [
        ("vni = 100", "vni = 16777216", ":5: vport.vni: "),
        ("vni = 100", "vni = \"x\"", ":5: vport.vni: "),
        ("vni = 100", "vny = 100", ":5: vport.vny: "),
        ("mac = \"02:", "mac = \"03:", ":6: vport.mac: "),
        ("198.51.100.1", "guest", ":7: vport.addresses: "),
        ("socket = \"a\"", "socket = \"h1.ctl\"", ":8: vport.socket: "),
        ("host = \"h1\"", "host = h1", ":1: host: "),
    ];
    for (good, bad, message) in table {
        directory.file("bad.toml", &GOOD.replace(good, bad));
        for arguments in [&["--config", "bad.toml"][..], &["--config", "bad.toml", "--check"]] {
            let output = directory.vsocketd(arguments);
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{bad}: {text}");
            assert!(text.contains(&format!("bad.toml{message}")), "{bad}: {text}");
        }
    }
    let output = directory.vsocketd(&["--config", "none.toml"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("none.toml"));
}

#[test]
fn strangers_at_both_ports_are_counted_by_name() {
    let lab = Lab::up("badinput-strangers");
    let witness = Witness::new(&lab);
    let request =
        |revision: &str, body: &str| format!("4d504120494420526571204672616d6500{revision}0026{body}");
    // Version 1, VNI 100 or one that nobody has, and a secret that nobody gave.
    let binding = |vni: &str| format!("0001{vni}{}", "5a".repeat(32));
    let table = [
        (4790, "474554202f20485454502f312e310d0a0d0a0d0a".to_owned(), "bad_magic"),
        (4790, request("01", &binding("00000064")), "unknown_secret"),
        (4790, request("01", &binding("00fffffe")), "unknown_secret"),
        (4790, request("07", &binding("00000064")), "wrong_version"),
        (4790, "4d5041".to_owned(), "hung_up"),
        (4791, "474554202f20485454502f312e310d0a0d0a".to_owned(), "not_tls"),
    ];
    for (port, bytes, name) in table {
        let before = lab.dropped("h2", name);
        let to = format!("192.0.2.2:{port}");
        lab.exec("h1", &[&example("stream"), "poke", &to, "--hex", &bytes]).ends(PROGRAM);
        wait_until(SOON, name, || lab.dropped("h2", name) > before);
    }
    // A backend of another authority that calls itself h1.
    let rogue = Directory::new();
    assert!(rogue.vsocketd(&["certs", "--out", "certs", "h1", "h2"]).status.success());
    let config = r#"host = "h1"
control = "rogue.ctl"
tls = { ca = "certs/ca.pem", cert = "certs/h1.pem", key = "certs/h1.key" }
peers = { listen = "192.0.2.1:4891" }
fabric = { kind = "soft", listen = "192.0.2.1:4890" }
peer = [{ host = "h2", vtep = "192.0.2.2", control = "192.0.2.2:4791" }]
"#;
    let here = format!("{}/", rogue.0.display());
    let config =
        config.replace("certs/", &format!("{here}certs/")).replace("rogue.ctl", &format!("{here}rogue.ctl"));
    let file = rogue.file("rogue.toml", &config);
    let before = lab.dropped("h2", "wrong_authority") + lab.dropped("h2", "rejected_by_peer");
    let program = common::agent::binary("vsocketd");
    let mut daemon = lab.exec("h1", &[program.to_str().unwrap(), "--config", file.to_str().unwrap()]);
    wait_until(SOON, "the rogue is refused", || {
        assert!(daemon.runs(), "{}", daemon.err());
        lab.dropped("h2", "wrong_authority") + lab.dropped("h2", "rejected_by_peer") > before
    });
    daemon.kill();
    witness.ends_well();
}

/// What is no message of ours, by the name it is counted under.
fn images() -> Vec<(Vec<u8>, &'static str)> {
    let good = Message::Ping { n: 1 }.encode();
    let with = |at: usize, value: u8| {
        let mut image = good.to_vec();
        image[at] = value;
        image
    };
    vec![
        (good[..100].to_vec(), "message-length"),
        ([&good[..], &good[..]].concat(), "message-length"),
        (with(0, b'X'), "message-magic"),
        (with(4, 77), "message-version"),
        (with(6, 200), "message-kind"),
    ]
}

#[test]
fn what_is_no_message_ends_its_sender_only() {
    let lab = Lab::up("badinput-messages");
    let witness = Witness::new(&lab);
    let state = lab.state();
    lab.daemon("stop", "agent", "b");
    for (image, name) in images() {
        let before = lab.dropped("h1", name);
        let fake = Fake::attach(&state.join("b.vport"));
        fake.say_raw(&image);
        assert!(fake.hear().is_none(), "{name}: hung up on");
        wait_until(SOON, name, || lab.dropped("h1", name) > before);
        // At the agent that the witness's program uses.
        let before = lab.stat("d").drops(name);
        let fake = Fake::silent(&state.join("d.agent"));
        fake.say_raw(&image);
        assert!(fake.hear().is_none(), "{name}: hung up on");
        wait_until(SOON, name, || lab.stat("d").drops(name) > before);
    }
    lab.daemon("start", "agent", "b");
    witness.ends_well();
}

/// Several that ask the agent, and ask again as soon as they are answered, so that one always waits to be accepted.
#[test]
fn who_asks_without_pause_keeps_nobody_from_being_heard() {
    let lab = Lab::up("badinput-asking");
    let socket = lab.state().join("a.agent");
    let (done, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let ask = || {
        while !done.load(Ordering::Relaxed) {
            let carrier = Carrier::connect(&socket).expect("the agent listens");
            carrier.send(&Message::Query { what: 1 }, &[]).expect("the agent listens");
            while carrier.recv().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                let _ = poll(&mut [PollFd::new(&carrier, PollFlags::IN)], None);
            }
            asked.fetch_add(1, Ordering::Relaxed);
        }
    };
    let came = std::thread::scope(|scope| {
        (0..16).for_each(|_| drop(scope.spawn(ask)));
        let server = lab.stream_server("run", "b", v4("b", 7900), &["--once"]);
        let client = lab.stream("run", "a", "echo", v4("b", 7900), &["--until-eof", "--every", "1"]);
        let lane =
            || lab.ss("a").iter().any(|l| l.pid() == client.pid() && l.lanes() == ("direct", "direct"));
        let end = Instant::now() + SOON;
        let came = std::iter::repeat_with(lane).take_while(|_| Instant::now() < end).any(|came| came);
        done.store(true, Ordering::Relaxed);
        drop((client, server));
        came
    });
    assert!(asked.load(Ordering::Relaxed) > 100, "asked only {asked:?} times");
    assert!(came, "not on its lane while {asked:?} questions were answered");
}

#[test]
fn a_ring_index_out_of_range_ends_its_own_flow() {
    let lab = Lab::up("badinput-index-fabric");
    let witness = Witness::new(&lab);
    let [from, to] = [v4("a", 6001), v4("c", 7001)];
    lab.daemon("stop", "agent", "c");
    let fake = Fake::attach(&lab.state().join("c.vport"));
    let _server = lab.stream_server("exec", "c", to, &[]);
    let options = ["--from", &from.to_string(), "--until-eof", "--every", "1"];
    let _victim = lab.stream("run", "a", "echo", to, &options);
    fake.open(1, to, from);
    let prepared = fake.prepare();
    fake.commit(&prepared);
    prepared.publish_stay(0);
    prepared.set_head(u64::MAX / 2);
    prepared.ring();
    let Message::Withdraw { conn: 1, reason, .. } = fake.message() else { panic!("no Withdraw") };
    assert_eq!(reason, Reason::Violation);
    wait_until(SOON, "counted", || lab.dropped("h2", "ring-index") == 1);
    drop(fake);
    lab.daemon("start", "agent", "c");
    witness.ends_well();
}

/// A direct lane's other mapper is as untrusted as any guest: what it writes ends the connection that it is an end of.
#[test]
fn a_ring_index_out_of_range_ends_its_own_direct_connection() {
    let lab = Lab::up("badinput-index-direct");
    let witness = Witness::new(&lab);
    lab.daemon("stop", "agent", "b");
    let fake = Fake::attach(&lab.state().join("b.vport"));
    let _server = lab.stream_server("exec", "b", v4("b", 7001), &[]);
    let _answerer = lab.exec("b", &["python3", "-c", ANSWERER]);
    let more_than_it_holds = |prepared: &Prepared| {
        prepared.publish_stay(20);
        prepared.set_head(u64::MAX / 2);
    };
    let more_than_was_put_there = |prepared: &Prepared| {
        // The sender sets the tail itself when it begins.
        wait_until(SOON, "it is on the ring", || lab.ss("a").iter().any(|l| l.lanes().0 == "direct"));
        prepared.set_tail(u64::MAX / 2);
    };
    // One that has received 20 bytes and waits for more; and one that writes.
    let reader = lab.run("a", &["python3", "-c", READER]);
    spoil(&lab, &fake, 1, more_than_it_holds);
    assert_eq!(reader.ends(SOON).ok(), "reset\n");
    let writer = ["--from", "198.51.100.1:6002", "--until-eof", "--one-way", "--pace", "100000000"];
    let writer = lab.stream("run", "a", "connect", v4("b", 7001), &writer);
    spoil(&lab, &fake, 2, more_than_was_put_there);
    let ended = writer.ends(SOON);
    assert!(!ended.status.success() && ended.out.contains("reset"), "{}{}", ended.out, ended.err);
    wait_until(SOON, "both are counted", || lab.stat("a").drops("ring-index") == 2);
    drop(fake);
    lab.daemon("start", "agent", "b");
    witness.ends_well();
}

/// Answers twenty bytes, one at a time, and then nothing.
const ANSWERER: &str = "
import socket, time
s = socket.create_server(('198.51.100.2', 7002)).accept()[0]
for _ in range(20): s.send(s.recv(1))
time.sleep(60)";

const READER: &str = "
import socket, time
for _ in range(100):
    try: s = socket.create_connection(('198.51.100.2', 7002), source_address=('198.51.100.1', 6001))
    except ConnectionRefusedError: time.sleep(0.05)
    else: break
for _ in range(20): s.send(b'x'); s.recv(1)
try: print(s.recv(1))
except ConnectionResetError: print('reset')";

/// Takes the lane of connection `n` from port 6000 + `n` of guest a, and writes into its segment.
fn spoil(lab: &Lab, fake: &Fake, n: u64, how: impl Fn(&Prepared)) {
    let from = v4("a", 6000 + n as u16);
    let to = wait_for(SOON, "the guest has opened it", || {
        let opened = lab.ss("a").into_iter().find(|l| l.local() == from.to_string() && l.pid() != 0)?;
        Some(opened.peer().parse().expect("an address"))
    });
    fake.open(n, to, from);
    let prepared = fake.prepare();
    fake.commit(&prepared);
    how(&prepared);
    prepared.ring();
}
