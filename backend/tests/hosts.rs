//! Two daemons in one process, joined by the soft fabric over loopback, each with guests driven by hand.

mod common;

use std::time::{Duration, Instant};

use common::{Agent, Dir, End, Prepared, RING, Running, Switch, eventually, soft, two_hosts, two_hosts_with};
use vsocket_backend::fabric::loopback;
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;

const A: &str = "198.51.100.1:4000";
const C: &str = "198.51.100.3:80";

struct Lab {
    h1: Running,
    h2: Running,
    switch: Switch,
    dir: Dir,
}

impl Lab {
    fn new() -> Self {
        let dir = Dir::new();
        let (h1, h2, switch) = two_hosts(&dir);
        Self { h1, h2, switch, dir }
    }

    fn agent(&self, name: &str) -> Agent {
        Agent::new(&self.dir.0.join(name))
    }
}

fn pair(a: &Agent, c: &Agent, conn: u64, generation: u32) -> (Prepared, Prepared) {
    common::pair(a, c, conn, [A, C], generation)
}

fn stream(seed: u64, len: usize) -> Vec<u8> {
    (seed..seed + len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

#[test]
fn eight_mebibytes_each_way() {
    const TOTAL: usize = 8 << 20;
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    let (ours, theirs) = pair(&a, &c, 1, 1);
    assert_eq!(ours.generation, theirs.generation);
    let pump = |mut end: End, send: Vec<u8>| {
        let (mut sent, mut got) = (0, Vec::with_capacity(TOTAL));
        let end_of_time = Instant::now() + Duration::from_secs(60);
        while sent < TOTAL || got.len() < TOTAL {
            let n = end.write(&send[sent..(sent + 50_000).min(TOTAL)]);
            let more = end.read(70_000);
            if n == 0 && more.is_empty() {
                std::thread::yield_now();
                assert!(Instant::now() < end_of_time, "sent {sent}, got {}", got.len());
            }
            sent += n;
            got.extend(more);
        }
        got
    };
    let begin = Instant::now();
    std::thread::scope(|s| {
        let one = s.spawn(move || pump(End::new(ours, 1000), stream(1, TOTAL)));
        let two = s.spawn(move || pump(End::new(theirs, u64::from(u32::MAX) - 99), stream(2, TOTAL)));
        assert!(two.join().unwrap() == stream(1, TOTAL), "a to c");
        assert!(one.join().unwrap() == stream(2, TOTAL), "c to a");
    });
    println!("{} MiB in {:?}", (2 * TOTAL) >> 20, begin.elapsed());
    eventually("all is acknowledged", || {
        let stat = lab.h1.stat();
        stat["vports"][0]["tx_bytes"] == TOTAL && stat["vports"][0]["rx_bytes"] == TOTAL
    });
    assert_eq!(lab.h1.stat()["lanes"]["fabric"], 1);
    assert_eq!(lab.h1.stat()["drops"], serde_json::json!({}));
}

#[test]
fn an_idle_lane_wakes_up_and_a_stay_is_confirmed() {
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    let (ours, theirs) = pair(&a, &c, 1, 3);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    for round in 0..5u8 {
        std::thread::sleep(Duration::from_millis(5));
        one.write(&[round; 3]);
        assert_eq!(two.read_exactly(3), [round; 3]);
        std::thread::sleep(Duration::from_millis(5));
        two.write(&[round; 9000]);
        assert_eq!(one.read_exactly(9000), [round; 9000]);
    }
    let confirmed =
        |end: &End| end.directions()[0].reader.confirmed.load(std::sync::atomic::Ordering::Relaxed);
    eventually("confirmed", || confirmed(&one) == 3 && confirmed(&two) == 3);
}

#[test]
fn either_order_and_either_lead() {
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    for (n, (x, y)) in [(A, C), ("198.51.100.1:9", "198.51.100.3:9")].into_iter().enumerate() {
        let conn = n as u64 + 1;
        if n == 0 {
            a.open(conn, x, y, 1);
            assert_eq!(a.hear(), Message::Declined { conn, reason: Reason::PeerNotOpen });
            c.open(conn, y, x, 4);
        } else {
            c.open(conn, y, x, 1);
            a.open(conn, x, y, 4);
        }
        let (ours, theirs) = (a.prepare(), c.prepare());
        a.commit(&ours);
        c.commit(&theirs);
        assert_eq!((ours.generation, theirs.generation), (4, 4));
    }
}

#[test]
fn tenants_with_the_same_addresses_do_not_meet() {
    let lab = Lab::new();
    let (a, d) = (lab.agent("a"), lab.agent("d"));
    a.open(1, A, C, 1);
    d.open(1, A, C, 1);
    for agent in [&a, &d] {
        assert_eq!(agent.hear(), Message::Declined { conn: 1, reason: Reason::PeerNotOpen });
    }
    let e = lab.agent("e");
    e.open(1, C, A, 1);
    let (ours, theirs) = (d.prepare(), e.prepare());
    d.commit(&ours);
    e.commit(&theirs);
    assert_eq!(lab.h1.stat()["lanes"]["fabric"], 1);
}

#[test]
fn leaving_on_one_host_withdraws_on_the_other_and_both_come_back() {
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    let (first, _) = pair(&a, &c, 1, 1);
    a.say(Message::Left { conn: 1, generation: 1 });
    assert_eq!(c.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerLeft });
    c.say(Message::Left { conn: 1, generation: 1 });
    let (again, theirs) = pair(&a, &c, 1, 2);
    assert_eq!(again.generation, 2);
    let _ = first;
    let (mut one, mut two) = (End::new(again, 5), End::new(theirs, 9));
    one.write(b"anew");
    assert_eq!(two.read_exactly(4), b"anew");
    eventually("the old stay is over", || lab.h1.stat()["stays"] == 1 && lab.h2.stat()["stays"] == 1);
}

#[test]
fn a_backend_that_ends_sends_its_guests_home() {
    let mut lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    pair(&a, &c, 1, 1);
    let begin = Instant::now();
    lab.h1.stop();
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::BackendGone });
    assert!(begin.elapsed() >= Duration::from_secs(1), "nobody said Left");
    let Message::Withdraw { conn: 1, generation: 1, reason } = c.hear() else { panic!() };
    assert_eq!(reason, Reason::PeerBackendGone);
}

#[test]
fn a_bad_index_ends_its_own_flow_only() {
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    let (ours, theirs) = pair(&a, &c, 1, 1);
    a.open(2, "198.51.100.1:5", "198.51.100.3:5", 1);
    c.open(2, "198.51.100.3:5", "198.51.100.1:5", 1);
    let (other, far) = (a.prepare(), c.prepare());
    a.commit(&other);
    c.commit(&far);
    let bad = End::new(ours, 5);
    let _far_of_bad = End::new(theirs, 5);
    bad.directions()[0].head.head.store(u64::MAX / 2, std::sync::atomic::Ordering::Release);
    bad.ring_backend();
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::Violation });
    assert_eq!(c.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::Violation });
    let (mut one, mut two) = (End::new(other, 5), End::new(far, 9));
    one.write(b"unharmed");
    assert_eq!(two.read_exactly(8), b"unharmed");
    assert_eq!(lab.h1.stat()["drops"]["ring-index"], 1);
}

#[test]
fn a_peer_that_does_not_answer_is_left_within_the_bound_and_found_again() {
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    let (ours, theirs) = pair(&a, &c, 1, 1);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    one.write(b"before");
    assert_eq!(two.read_exactly(6), b"before");
    lab.switch.freeze(true);
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(lab.h1.stat()["lanes"]["fabric"], 1, "silence is no fault while nothing is owed");
    one.write(b"owed");
    let begin = Instant::now();
    assert_eq!(a.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::NotAnswering });
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(400) && took < Duration::from_secs(3), "{took:?}");
    a.say(Message::Left { conn: 1, generation: 1 });
    lab.switch.freeze(false);
    assert_eq!(c.hear(), Message::Withdraw { conn: 1, generation: 1, reason: Reason::PeerBackendGone });
    c.say(Message::Left { conn: 1, generation: 1 });
    let (ours, theirs) = pair(&a, &c, 1, 2);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    one.write(b"after");
    assert_eq!(two.read_exactly(5), b"after");
    eventually("nothing is left over", || lab.h1.stat()["stays"] == 1 && lab.h2.stat()["stays"] == 1);
}

#[test]
fn idle_lanes_cost_no_time() {
    let lab = Lab::new();
    let (a, c) = (lab.agent("a"), lab.agent("c"));
    let (ours, theirs) = pair(&a, &c, 1, 1);
    let (mut one, mut two) = (End::new(ours, 5), End::new(theirs, 9));
    one.write(b"busy");
    assert_eq!(two.read_exactly(4), b"busy");
    std::thread::sleep(Duration::from_millis(20));
    let wakes = || lab.h1.stat()["passes"].as_u64().unwrap();
    let before = wakes();
    std::thread::sleep(Duration::from_millis(500));
    let after = wakes();
    // The question itself wakes the daemon, which then polls for 50 µs.
    assert!(after - before < 2000, "{before} {after}");
    std::thread::sleep(Duration::from_millis(500));
    assert!(wakes() - after < 2000);
}

#[test]
fn different_fabrics_stay_on_tcp_and_say_so() {
    let dir = Dir::new();
    let (memory, _other_end) = loopback::pair().unwrap();
    let (h1, h2, _switch) = two_hosts_with(&dir, RING, [soft(), Box::new(memory)]);
    let (a, c) = (Agent::new(&dir.0.join("a")), Agent::new(&dir.0.join("c")));
    a.open(1, A, C, 1);
    c.open(1, C, A, 1);
    for agent in [&a, &c] {
        let declined = Message::Declined { conn: 1, reason: Reason::FabricMismatch };
        // Until both have opened, each hears that the other has not.
        while agent.hear() != declined {}
    }
    let (stat, far) = (h1.stat(), h2.stat());
    assert_eq!((&stat["peers"][0]["fabric"], &stat["fabric"]), (&"memory".into(), &"soft".into()));
    assert_eq!(
        (&stat["drops"]["qp-offer-fabric"], &far["drops"]["qp-refused-fabric"]),
        (&1.into(), &1.into())
    );
    assert_eq!(stat["fabric_uses"]["queue_pairs"], 0);
}
