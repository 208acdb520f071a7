//! The program itself: two daemons with certificates and configuration files, and what signals do to them.

mod common;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use common::{Agent, Dir, End, eventually, pair};
use rustix::process::{Pid, Signal, kill_process};
use vsocket_backend::operator::stat;
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;

const A: &str = "198.51.100.1:4000";
const C: &str = "198.51.100.3:80";
const PROGRAM: &str = env!("CARGO_BIN_EXE_vsocketd");

struct Host {
    name: &'static str,
    config: PathBuf,
    control: PathBuf,
    child: Option<Child>,
}

impl Host {
    fn start(&mut self) {
        let run = Command::new(PROGRAM).arg("--config").arg(&self.config).stderr(Stdio::null()).spawn();
        self.child = Some(run.unwrap());
        eventually("the daemon answers", || stat(&self.control, false).is_ok());
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    fn end(&mut self) -> Option<i32> {
        self.child.take().unwrap().wait().unwrap().code()
    }

    fn peer_is_up(&self) -> bool {
        stat(&self.control, false).unwrap()["peers"][0]["up"] == true
    }

    /// Processor time used so far.
    fn time(&self) -> u64 {
        let pid = self.child.as_ref().unwrap().id();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A loopback address that no other test uses, so that a port that is free stays so.
fn own_address() -> Ipv4Addr {
    static LAST: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 64 + LAST.fetch_add(1, Ordering::Relaxed), high, low | 1)
}

fn free_port(address: Ipv4Addr) -> u16 {
    std::net::TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port()
}

fn two_hosts(dir: &Dir) -> [Host; 2] {
    let certs = dir.0.join("certs");
    let made = Command::new(PROGRAM).args(["certs", "--out"]).arg(&certs).args(["h1", "h2"]).output();
    assert!(made.unwrap().status.success());
    let at = own_address();
    let ports = [(); 2].map(|()| [free_port(at), free_port(at)]);
    let names = ["h1", "h2"];
    let guests = [("a", "198.51.100.1", 1), ("c", "198.51.100.3", 3)];
    [0, 1].map(|n| {
        let (host, far) = (names[n], names[1 - n]);
        let ((name, address, mac), (_, far_address, far_mac)) = (guests[n], guests[1 - n]);
        let root = dir.0.display();
        let [control, fabric] = ports[n];
        let far_control = ports[1 - n][0];
        let text = format!(
            r#"
host = "{host}"
control = "{root}/{host}.ctl"
tls = {{ ca = "{root}/certs/ca.pem", cert = "{root}/certs/{host}.pem", key = "{root}/certs/{host}.key" }}
peers = {{ listen = "{at}:{control}" }}
fabric = {{ kind = "soft", listen = "{at}:{fabric}" }}
[[peer]]
host = "{far}"
vtep = "127.0.0.{}"
control = "{at}:{far_control}"
[[vport]]
name = "{name}"
vni = 100
mac = "02:00:00:00:00:0{mac}"
addresses = ["{address}"]
socket = "{root}/{name}"
[[directory]]
vni = 100
address = "{far_address}"
mac = "02:00:00:00:00:0{far_mac}"
vtep = "127.0.0.{}"
"#,
            2 - n,
            2 - n
        );
        let config = dir.0.join(format!("{host}.toml"));
        std::fs::write(&config, text).unwrap();
        Host { name: host, config, control: dir.0.join(format!("{host}.ctl")), child: None }
    })
}

fn started(dir: &Dir) -> [Host; 2] {
    let mut hosts = two_hosts(dir);
    hosts.iter_mut().for_each(Host::start);
    eventually("the peers meet", || hosts.iter().all(Host::peer_is_up));
    hosts
}

#[test]
fn a_killed_backend_comes_back_and_its_flows_too() {
    let dir = Dir::new();
    let mut hosts = started(&dir);
    let a = Agent::new(&dir.0.join("a"));
    let c = Agent::new(&dir.0.join("c"));
    let (ours, theirs) = pair(&a, &c, 1, [A, C], 1);
    let (mut one, mut two) = (End::new(ours, 7), End::new(theirs, 8));
    one.write(&[5; 200_000]);
    assert_eq!(two.read_exactly(200_000), [5; 200_000]);

    hosts[1].signal(Signal::KILL);
    hosts[1].end();
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerBackendGone });
    a.say(Message::Left { conn: 1, generation: 1 });
    a.open(1, A, C, 2);
    eventually("the peer's end is known", || {
        a.hear() == Message::Declined { conn: 1, reason: Reason::PeerHostDown }
    });

    hosts[1].start();
    let c = Agent::new(&dir.0.join("c"));
    c.open(1, C, A, 2);
    let (ours, theirs) = (a.prepare(), c.prepare());
    a.commit(&ours);
    c.commit(&theirs);
    let (mut one, mut two) = (End::new(ours, 7), End::new(theirs, 8));
    two.write(b"again");
    assert_eq!(one.read_exactly(5), b"again");
}

#[test]
fn a_stopped_backend_is_left_and_its_waking_harms_nobody() {
    let dir = Dir::new();
    let hosts = started(&dir);
    let a = Agent::new(&dir.0.join("a"));
    let c = Agent::new(&dir.0.join("c"));
    let (ours, theirs) = pair(&a, &c, 1, [A, C], 1);
    let (mut one, mut two) = (End::new(ours, 7), End::new(theirs, 8));
    one.write(b"before");
    assert_eq!(two.read_exactly(6), b"before");
    hosts[1].signal(Signal::STOP);
    one.write(b"owed");
    let begin = Instant::now();
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::NotAnswering });
    // The bound is 0.6 s; the machine may be busy.
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    a.say(Message::Left { conn: 1, generation: 1 });
    hosts[1].signal(Signal::CONT);
    let Message::Withdraw { conn: 1, generation: 1, .. } = c.hear() else { panic!() };
    c.say(Message::Left { conn: 1, generation: 1 });
    a.open(1, A, C, 2);
    c.open(1, C, A, 2);
    let (ours, theirs) = (a.prepare(), c.prepare());
    a.commit(&ours);
    c.commit(&theirs);
    let (mut one, mut two) = (End::new(ours, 7), End::new(theirs, 8));
    one.write(b"after");
    assert_eq!(two.read_exactly(5), b"after");
}

#[test]
fn idle_costs_nothing_and_an_end_is_orderly() {
    let dir = Dir::new();
    let mut hosts = started(&dir);
    let a = Agent::new(&dir.0.join("a"));
    let c = Agent::new(&dir.0.join("c"));
    let (ours, theirs) = pair(&a, &c, 1, [A, C], 1);
    let (mut one, mut two) = (End::new(ours, 7), End::new(theirs, 8));
    one.write(b"x");
    assert_eq!(two.read_exactly(1), b"x");
    let rests = |during: Duration| {
        let before = hosts.each_ref().map(Host::time);
        std::thread::sleep(during);
        (hosts.each_ref().map(Host::time), before)
    };
    eventually("they come to rest", || {
        let (after, before) = rests(Duration::from_millis(100));
        after == before
    });
    let (after, before) = rests(Duration::from_secs(2));
    assert_eq!(after, before, "clock ticks while nothing moves");

    hosts[0].signal(Signal::TERM);
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::BackendGone });
    a.say(Message::Left { conn: 1, generation: 1 });
    assert_eq!(c.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerBackendGone });
    assert_eq!(hosts[0].end(), Some(0), "{}", hosts[0].name);
    assert!(!dir.0.join("a").exists() && !hosts[0].control.exists());
}

#[test]
fn the_operators_commands() {
    let dir = Dir::new();
    let hosts = started(&dir);
    let run = |words: &[&str]| {
        let out =
            Command::new(PROGRAM).args(words).env("VSOCKETD_CONTROL", &hosts[0].control).output().unwrap();
        let text = String::from_utf8([out.stdout, out.stderr].concat()).unwrap();
        (out.status.success(), text)
    };
    let (ok, text) = run(&["stat"]);
    assert!(ok && text.contains("host: h1") && text.contains("fabric: soft"), "{text}");
    let (ok, text) = run(&["stat", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(ok && json["vports"][0]["name"] == "a" && json["peers"][0]["host"] == "h2");
    assert!(run(&["stat", "--connections"]).0);
    assert!(run(&["drain", "a"]).0);
    assert_eq!(stat(&hosts[0].control, false).unwrap()["vports"][0]["drained"], true);
    assert!(run(&["undrain", "a"]).0);
    assert_eq!(stat(&hosts[0].control, false).unwrap()["vports"][0]["drained"], false);
    let (ok, text) = run(&["drain", "nobody"]);
    assert!(!ok && text.contains("there is no vport nobody; there are: a"), "{text}");
    let (ok, text) = run(&["stat", "--control", "/nonexistent/socket"]);
    assert!(!ok && text.contains("/nonexistent/socket"), "{text}");
}
