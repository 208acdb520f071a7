//! Two hosts' pairings, joined by queues; the agents and the queue pair are played.
#![allow(clippy::needless_range_loop)] // a host's number picks from several arrays

use super::tests::{Segs, facts};
use super::*;
use crate::directory::Place as Where;
use crate::peer::message::{PeerMessage, RegionRef};
use vsocket_channel::Side;

const ENDS: [EndId; 2] = [EndId { vport: 0, conn: 1 }, EndId { vport: 0, conn: 2 }];

struct Host {
    pairing: Pairing,
    segs: Segs,
    /// What the agent was told, as text.
    heard: Vec<String>,
    /// Flows that exist: whether each is stopped.
    flows: HashMap<u64, bool>,
    /// Messages for the peer, in order.
    control: VecDeque<PeerMessage>,
    /// Ends of flows, in order behind their data: the peer's flow number.
    data: VecDeque<u64>,
    peer_flows: HashMap<u64, u64>,
    qp_wanted: bool,
}

struct Two {
    hosts: [Host; 2],
    now: Instant,
    qp: bool,
}

fn rx() -> RegionRef {
    RegionRef { stag: 1, base: 4096, len: 4096 }
}

fn tuples() -> [Tuple; 2] {
    let one = Tuple::new("198.51.100.1:4000".parse().unwrap(), "198.51.100.3:80".parse().unwrap());
    [one, one.mirrored()]
}

impl Two {
    fn new() -> Self {
        let addresses = ["198.51.100.1", "198.51.100.3"];
        let hosts = [0, 1].map(|n| {
            let far = HostName::new(["h2", "h1"][n]).unwrap();
            let mut directory = Directory::default();
            let place =
                Where { host: far.clone(), vtep: "192.0.2.1".parse().unwrap(), mac: Mac([2, 0, 0, 0, 0, 9]) };
            directory.insert(100, addresses[1 - n].parse().unwrap(), place);
            let pairing = Pairing::new(vec![facts(100, addresses[n], 8)], directory, &[far]);
            Host {
                pairing,
                segs: Segs::default(),
                heard: vec![],
                flows: HashMap::new(),
                control: VecDeque::new(),
                data: VecDeque::new(),
                peer_flows: HashMap::new(),
                qp_wanted: false,
            }
        });
        let mut two = Self { hosts, now: Instant::now(), qp: true };
        for host in &mut two.hosts {
            host.pairing.handle_peer_up(0);
            host.pairing.handle_qp_up(0, 100);
        }
        two
    }

    /// Does everything a host wants done; says whether there was anything.
    fn step(&mut self, n: usize) -> bool {
        let qp = self.qp;
        let host = &mut self.hosts[n];
        let mut any = false;
        while let Some(effect) = host.pairing.poll(&mut host.segs) {
            any = true;
            match effect {
                Effect::Tell { message, .. } => host.heard.push(match message {
                    Message::Declined { reason, .. } => format!("declined {}", reason.name()),
                    Message::Commit { generation, .. } => format!("commit {generation}"),
                    Message::Withdraw { generation, reason, .. } => {
                        format!("withdraw {generation} {}", reason.name())
                    }
                    other => panic!("{other:?}"),
                }),
                Effect::Prepare { generation, side, lane, .. } => {
                    assert_eq!((side, lane), (Side::Zero, Lane::Fabric));
                    host.heard.push(format!("prepare {generation}"));
                }
                Effect::Release { segment, reuse } => host.segs.give_back(segment, reuse),
                Effect::Peer { message, .. } => host.control.push_back(message),
                Effect::NeedQp { .. } => host.qp_wanted = true,
                Effect::FlowStart(start) if qp => {
                    assert!(host.flows.insert(start.flow, false).is_none());
                    host.peer_flows.insert(start.flow, start.peer_flow);
                    let FlowStart { flow, peer_flow, generation, .. } = start;
                    host.control.push_back(match start.rx {
                        Some(_) => PeerMessage::Prepared { flow, peer_flow, generation, rx: rx() },
                        None => PeerMessage::Prepare { flow, peer_flow, generation, rx: rx() },
                    });
                }
                Effect::FlowStart(start) => host.pairing.handle_unstarted(start.flow, Reason::FabricDown),
                Effect::FlowReady { .. } => {}
                Effect::FlowStop { flow } => {
                    if host.flows.insert(flow, true) == Some(false) {
                        host.data.push_back(host.peer_flows[&flow]);
                    }
                }
                Effect::FlowDrop { flow } => {
                    host.flows.remove(&flow);
                }
                Effect::RelayStart(_) | Effect::RelayStop { .. } => panic!("{effect:?}"),
            }
        }
        any
    }

    /// Delivers one control message of host `n`.
    fn deliver(&mut self, n: usize) -> bool {
        let Some(message) = self.hosts[n].control.pop_front() else { return false };
        let far = &mut self.hosts[1 - n];
        let _ = far.pairing.handle_peer_message(0, &message, &mut far.segs);
        true
    }

    /// Delivers one end of a flow of host `n`.
    fn deliver_data(&mut self, n: usize) -> bool {
        let Some(flow) = self.hosts[n].data.pop_front() else { return false };
        let far = &mut self.hosts[1 - n];
        // Without a flow of that number there is nobody to take it.
        if far.flows.contains_key(&flow) {
            far.pairing.handle_quiet(flow);
        }
        true
    }

    fn run(&mut self) {
        loop {
            let mut any = false;
            for n in 0..2 {
                any |= self.step(n);
                any |= self.deliver(n);
                any |= self.deliver_data(n);
            }
            if !any {
                return;
            }
        }
    }

    fn open(&mut self, n: usize, min: u32) {
        self.hosts[n].pairing.handle_open(ENDS[n], 1, tuples()[n], min);
        self.run();
    }

    fn heard(&mut self, n: usize) -> Vec<String> {
        std::mem::take(&mut self.hosts[n].heard)
    }

    fn prepared(&mut self, n: usize, generation: u32) {
        self.hosts[n].pairing.handle_prepared(ENDS[n], generation);
        self.run();
    }

    fn left(&mut self, n: usize, generation: u32) {
        self.hosts[n].pairing.handle_left(ENDS[n], generation);
        self.run();
    }

    fn committed(first: usize) -> Self {
        let mut two = Self::new();
        two.open(first, 1);
        two.open(1 - first, 3);
        two.prepared(0, 3);
        two.prepared(1, 3);
        for n in 0..2 {
            let heard = two.heard(n);
            assert!(heard.ends_with(&["prepare 3".into(), "commit 3".into()]), "{heard:?}");
        }
        two
    }

    fn nothing_is_left(&self) {
        for host in &self.hosts {
            assert_eq!((host.pairing.stays(), host.segs.out.len(), host.flows.len()), (0, 0, 0));
        }
    }
}

#[test]
fn either_may_open_first_and_the_smaller_address_leads() {
    Two::committed(0);
    Two::committed(1);
    let mut two = Two::new();
    two.open(1, 1);
    two.open(0, 1);
    assert_eq!(two.heard(1), ["declined peer-not-open"]);
    assert_eq!(two.heard(0), ["prepare 1"], "the leader asks its guest first");
    two.prepared(0, 1);
    assert_eq!(two.heard(1), ["prepare 1"]);
    two.prepared(1, 1);
    assert_eq!((two.heard(0), two.heard(1)), (vec!["commit 1".into()], vec!["commit 1".into()]));
}

#[test]
fn leaving_is_told_and_memory_waits_for_both_words() {
    for n in 0..2 {
        let mut two = Two::committed(0);
        two.left(n, 3);
        assert_eq!(two.heard(1 - n), ["withdraw 3 peer-left"]);
        assert_eq!(two.hosts[n].segs.out.len(), 0, "the peer has said its last word");
        assert_eq!(two.hosts[1 - n].segs.out.len(), 1, "its own guest has not left");
        two.left(1 - n, 3);
        two.nothing_is_left();
        two.open(0, 4);
        two.open(1, 4);
        assert!(two.heard(0).contains(&"prepare 4".to_owned()));
    }
}

#[test]
fn a_segment_is_not_free_before_the_peers_last_byte() {
    let mut two = Two::committed(0);
    two.hosts[0].pairing.handle_left(ENDS[0], 3);
    two.step(0);
    assert_eq!(two.hosts[0].segs.out.len(), 1);
    while two.deliver(0) {}
    two.step(1);
    while two.deliver(1) {}
    two.step(0);
    assert_eq!(two.hosts[0].segs.out.len(), 1, "its control message does not say that its WRITEs are here");
    two.run();
    assert_eq!(two.hosts[0].segs.out.len(), 0);
}

#[test]
fn refusals_reach_the_other_side_with_their_reason() {
    let mut two = Two::new();
    two.open(0, 1);
    two.open(1, 1);
    two.prepared(0, 1);
    let now = two.now;
    two.heard(0);
    two.hosts[1].pairing.handle_refused(ENDS[1], 1, Reason::Untrackable, now);
    two.run();
    assert_eq!(two.heard(0), ["withdraw 1 untrackable"]);
    two.left(0, 1);
    two.nothing_is_left();

    let mut two = Two::new();
    two.open(0, 1);
    two.open(1, 1);
    two.hosts[0].pairing.handle_refused(ENDS[0], 1, Reason::Untrackable, now);
    two.run();
    assert!(two.heard(1).is_empty(), "the peer was never asked");
    two.nothing_is_left();
    two.open(0, 5);
    two.prepared(0, 5);
    assert_eq!(two.heard(1), ["prepare 5"], "its offer still stands");
}

#[test]
fn busy_on_either_side_is_tried_again() {
    for n in 0..2 {
        let mut two = Two::new();
        two.open(0, 1);
        two.open(1, 1);
        if n == 1 {
            two.prepared(0, 1);
        }
        let now = two.now;
        two.hosts[n].pairing.handle_refused(ENDS[n], 1, Reason::Busy, now);
        two.run();
        two.left(1 - n, 1);
        two.hosts[n].pairing.handle_timeout(now + REST);
        two.run();
        assert_eq!(two.hosts[0].heard.last().unwrap(), "prepare 2", "side {n}: {:?}", two.hosts[0].heard);
        two.prepared(0, 2);
        two.prepared(1, 2);
        assert_eq!(two.hosts[1].heard.last().unwrap(), "commit 2");
    }
}

#[test]
fn a_peer_that_is_down_is_offered_again_when_up() {
    let mut two = Two::new();
    for host in &mut two.hosts {
        host.pairing.handle_peer_down(0, Reason::PeerBackendGone);
    }
    two.open(0, 1);
    assert_eq!(two.heard(0), ["declined peer-host-down"]);
    two.open(1, 1);
    for host in &mut two.hosts {
        host.pairing.handle_peer_up(0);
    }
    two.run();
    assert!(two.hosts.iter().all(|h| h.qp_wanted));
    for host in &mut two.hosts {
        host.pairing.handle_qp_up(0, 100);
    }
    two.run();
    assert_eq!(two.heard(0).last().unwrap(), "prepare 1");
}

#[test]
fn a_lost_peer_or_queue_pair_sends_the_guests_home() {
    for whole in [true, false] {
        let mut two = Two::committed(0);
        for host in &mut two.hosts {
            host.data.clear();
            if whole {
                host.pairing.handle_peer_down(0, Reason::PeerBackendGone);
            } else {
                host.pairing.handle_qp_down(0, 100, Reason::FabricDown);
            }
        }
        two.run();
        let reason = if whole { "withdraw 3 peer-backend-gone" } else { "withdraw 3 fabric-down" };
        for n in 0..2 {
            assert_eq!(two.heard(n), [reason]);
            two.left(n, 3);
        }
        two.nothing_is_left();
    }
}

#[test]
fn offers_are_checked() {
    let mut two = Two::new();
    let host = &mut two.hosts[0];
    let mut offer = |vni, local: &str, remote: &str| {
        let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
        let message = PeerMessage::Offer { flow: 1, vni, local, remote, mac: [0; 6], min_gen: 1 };
        host.pairing.handle_peer_message(0, &message, &mut host.segs)
    };
    assert_eq!(offer(100, "198.51.100.3:1", "198.51.100.1:1"), Ok(()));
    assert_eq!(offer(200, "198.51.100.3:1", "198.51.100.1:1"), Err(Dropped::Address), "another tenant");
    assert_eq!(offer(100, "198.51.100.1:1", "198.51.100.1:1"), Err(Dropped::Address), "our own address");
    assert_eq!(offer(100, "198.51.100.9:1", "198.51.100.1:1"), Err(Dropped::Address), "in no directory");
    assert_eq!(offer(100, "198.51.100.3:1", "198.51.100.8:1"), Err(Dropped::Address), "to nobody here");
    let unknown = PeerMessage::Commit { flow: 1, peer_flow: 9, generation: 1 };
    assert_eq!(host.pairing.handle_peer_message(0, &unknown, &mut host.segs), Err(Dropped::Unknown));
    let odd = PeerMessage::Ping { n: 1 };
    assert_eq!(host.pairing.handle_peer_message(0, &odd, &mut host.segs), Err(Dropped::Unexpected));
}

#[test]
fn a_drain_takes_offers_back_and_an_end_of_it_renews_them() {
    let mut two = Two::committed(0);
    two.hosts[1].pairing.handle_drain(0, true);
    two.run();
    assert_eq!(two.heard(0), ["withdraw 3 drained"]);
    assert_eq!(two.heard(1), ["withdraw 0 drained"]);
    two.left(0, 3);
    two.left(1, 3);
    two.open(0, 4);
    two.open(1, 4);
    assert_eq!(
        (two.heard(0), two.heard(1)),
        (vec!["declined peer-not-open".into()], vec!["declined drained".into()])
    );
    two.hosts[1].pairing.handle_drain(0, false);
    two.run();
    assert_eq!(two.heard(0), ["prepare 4"]);
}

#[test]
fn closing_in_the_middle_leaves_nothing() {
    for (n, after) in [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)] {
        let mut two = Two::new();
        two.open(0, 1);
        two.open(1, 1);
        if after > 0 {
            two.prepared(0, 1);
        }
        if after > 1 {
            two.prepared(1, 1);
        }
        two.hosts[n].pairing.handle_close(ENDS[n]);
        two.run();
        two.left(0, 1);
        two.left(1, 1);
        two.nothing_is_left();
    }
}

/// Anything in any order: guests that open, answer, leave and close, messages and last bytes delivered one by one,
/// queue pairs that go. No segment is handed out twice (`Segs` asserts it), and when all have left nothing is held.
#[test]
fn any_order_of_events_ends_with_nothing_held() {
    for seed in 1..3000u64 {
        let mut random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let mut next = |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let mut two = Two::new();
        for _ in 0..80 {
            let n = next(2) as usize;
            let held = two.hosts[n].pairing.parties.keys().next().copied();
            let now = two.now;
            let pairing = &mut two.hosts[n].pairing;
            match (next(13), held) {
                (0..=2, _) => pairing.handle_open(ENDS[n], 1, tuples()[n], next(6) as u32),
                (3..=5, Some((id, g))) => pairing.handle_prepared(id, g),
                (6, Some((id, g))) => pairing.handle_refused(id, g, Reason::Busy, now),
                (7, Some((id, g))) => pairing.handle_left(id, g),
                (8, _) if next(3) == 0 => pairing.handle_close(ENDS[n]),
                (9, _) => {
                    two.now += REST;
                    pairing.handle_timeout(now + REST);
                }
                (10, _) if next(8) == 0 => _ = pairing.handle_drain(0, true),
                (11, _) => _ = pairing.handle_drain(0, false),
                (12, _) if next(10) == 0 => {
                    // The queue pair goes, with what was under way on it.
                    two.hosts.iter_mut().for_each(|h| h.data.clear());
                    for host in &mut two.hosts {
                        host.pairing.handle_qp_down(0, 100, Reason::FabricDown);
                        host.pairing.handle_qp_up(0, 100);
                    }
                }
                _ => {}
            }
            two.step(n);
            for _ in 0..next(3) {
                two.deliver(next(2) as usize);
                two.deliver_data(next(2) as usize);
            }
        }
        // There is a way out of every state: open ends that answer get their lane.
        two.now += REST;
        for n in 0..2 {
            two.hosts[n].pairing.handle_drain(0, false);
            two.hosts[n].pairing.handle_open(ENDS[n], 1, tuples()[n], 1);
            two.hosts[n].pairing.handle_timeout(two.now);
        }
        for _ in 0..12 {
            two.run();
            for n in 0..2 {
                let held: Vec<_> = two.hosts[n].pairing.parties.iter().map(|(k, v)| (*k, v.0)).collect();
                for ((id, g), stay) in held {
                    let ending = two.hosts[n].pairing.stays[&stay].ending;
                    if ending {
                        two.hosts[n].pairing.handle_left(id, g);
                    } else {
                        two.hosts[n].pairing.handle_prepared(id, g);
                    }
                }
                let spent = two.hosts[n].pairing.ends[&ENDS[n]].state == EndState::Spent;
                if spent {
                    two.hosts[n].pairing.handle_open(ENDS[n], 1, tuples()[n], 1);
                }
            }
        }
        for (n, host) in two.hosts.iter().enumerate() {
            assert_eq!(host.pairing.lanes().fabric, 1, "seed {seed} host {n}: {:?}", host.pairing);
        }
        for n in 0..2 {
            two.hosts[n].pairing.handle_close(ENDS[n]);
        }
        two.run();
        for n in 0..2 {
            let held: Vec<_> = two.hosts[n].pairing.parties.keys().copied().collect();
            for (id, g) in held {
                two.hosts[n].pairing.handle_left(id, g);
            }
        }
        two.run();
        for (n, host) in two.hosts.iter().enumerate() {
            assert_eq!(host.pairing.stays(), 0, "seed {seed} host {n}: {:?}", host.pairing.stays);
            assert!(host.segs.out.is_empty() && host.pairing.flows.is_empty(), "seed {seed} host {n}");
            assert!(
                host.pairing.remote_offers.is_empty(),
                "seed {seed} host {n}: {:?}",
                host.pairing.remote_offers
            );
        }
    }
}

#[test]
fn who_has_no_memory_yet_is_not_offered_and_one_outrun_is_offered_again() {
    for late in 0..2 {
        let mut two = Two::new();
        two.hosts[late].segs.there = Some(0);
        two.open(0, 1);
        two.open(1, 1);
        assert_eq!(two.heard(1 - late), ["declined peer-not-open"]);
        assert!(two.heard(late).is_empty());
        two.hosts[late].segs.there = Some(1);
        two.hosts[late].pairing.handle_memory((0, 1));
        two.run();
        assert_eq!(two.heard(0), ["prepare 1"]);
    }
    let mut two = Two::new();
    two.open(1, 1);
    two.hosts[1].segs.there = Some(0);
    two.open(0, 1);
    two.prepared(0, 1);
    assert!(!two.heard(1).contains(&"prepare 1".to_owned()));
    two.left(0, 1);
    two.hosts[1].segs.there = None;
    two.hosts[1].pairing.handle_memory((0, 1));
    two.run();
    let generation = two.hosts[0].pairing.parties.keys().next().unwrap().1;
    two.prepared(0, generation);
    assert!(two.heard(1).contains(&format!("prepare {generation}")));
}
