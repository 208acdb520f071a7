//! Pairing on one host over shared memory, and the tools for the other test files.

use std::collections::{HashMap, HashSet};

use super::*;
use crate::relay::RELAY;
use crate::slab::{SegmentId, SlabKey, Taken};

pub const A: EndId = EndId { vport: 0, conn: 1 };
pub const B: EndId = EndId { vport: 1, conn: 2 };

pub fn tuple(local: &str, remote: &str) -> Tuple {
    Tuple::new(local.parse().unwrap(), remote.parse().unwrap())
}

pub fn a_to_b() -> Tuple {
    tuple("198.51.100.1:4000", "198.51.100.2:80")
}

/// Segments without memory: what is out, and what is lost.
#[derive(Default)]
pub struct Segs {
    pub out: HashSet<SegmentId>,
    free: HashMap<SlabKey, Vec<SegmentId>>,
    pub keys: HashMap<SegmentId, SlabKey>,
    last: u64,
    pub empty: bool,
    /// Segments that are there; what is above is still to come.
    pub there: Option<usize>,
}

impl Segments for Segs {
    fn take(&mut self, key: SlabKey, _ring_len: u64) -> Taken {
        if self.empty {
            return Taken::Nothing(Reason::Quota);
        }
        if !self.look(key, 0) {
            return Taken::Coming;
        }
        let id = self.free.entry(key).or_default().pop().unwrap_or_else(|| {
            self.last += 1;
            SegmentId { slab: self.last, index: 0 }
        });
        self.keys.insert(id, key);
        assert!(self.out.insert(id), "handed out twice");
        Taken::Segment(id)
    }

    fn look(&mut self, _key: SlabKey, _ring_len: u64) -> bool {
        self.there.is_none_or(|there| self.out.len() < there)
    }
}

impl Segs {
    pub fn give_back(&mut self, id: SegmentId, reuse: bool) {
        assert!(self.out.remove(&id), "given back twice");
        if reuse {
            self.free.entry(self.keys[&id]).or_default().push(id);
        }
    }
}

pub fn facts(vni: u32, address: &str, max_connections: u32) -> VportFacts {
    let addresses = vec![address.parse().unwrap()];
    VportFacts {
        vni,
        addresses,
        mac: Mac([2, 0, 0, 0, 0, 1]),
        max_connections,
        ring_len: 4096,
        relayed: false,
    }
}

pub struct One {
    pub pairing: Pairing,
    pub segs: Segs,
    pub now: Instant,
}

impl One {
    fn new() -> Self {
        Self::with([false; 3])
    }

    /// Three guests, of which some share no memory.
    pub fn with(relayed: [bool; 3]) -> Self {
        let vports =
            [facts(100, "198.51.100.1", 3), facts(100, "198.51.100.2", 3), facts(200, "198.51.100.2", 3)];
        let vports = vports.into_iter().zip(relayed);
        let vports = vports.map(|(facts, relayed)| VportFacts { relayed, ..facts }).collect();
        let pairing = Pairing::new(vports, Directory::default(), &[]);
        Self { pairing, segs: Segs::default(), now: Instant::now() }
    }

    /// Everything there is to do, as text that tests compare.
    pub fn done(&mut self) -> Vec<String> {
        let mut out = vec![];
        while let Some(effect) = self.pairing.poll(&mut self.segs) {
            out.push(match effect {
                Effect::Tell { vport, message } => match message {
                    Message::Declined { conn, reason } => {
                        format!("{vport}/{conn} declined {}", reason.name())
                    }
                    Message::Commit { conn, generation } => format!("{vport}/{conn} commit {generation}"),
                    Message::Withdraw { conn, generation, reason } => {
                        format!("{vport}/{conn} withdraw {generation} {}", reason.name())
                    }
                    other => panic!("{other:?}"),
                },
                Effect::Prepare { end, generation, side, lane, .. } => {
                    let carried = if lane == Lane::Fabric { ", carried" } else { "" };
                    format!("{}/{} prepare {generation} side {}{carried}", end.vport, end.conn, side.index())
                }
                Effect::Release { segment, reuse } => {
                    self.segs.give_back(segment, reuse);
                    let whose = match self.segs.keys[&segment] {
                        SlabKey::Fabric((vport, _), _) => format!(" of {vport}"),
                        SlabKey::Direct(..) => String::new(),
                    };
                    format!("release{whose} {}", if reuse { "to reuse" } else { "lost" })
                }
                Effect::RelayStart(RelayStart { vports: [a, b], generation, segments, .. }) => {
                    let keys = segments.map(|segment| self.segs.keys[&segment]);
                    assert_eq!(keys, [a, b].map(|vport| SlabKey::Fabric((vport, 1), RELAY)));
                    format!("relay {a} {b} generation {generation}")
                }
                Effect::RelayStop { .. } => "relay ends".to_owned(),
                other => panic!("{other:?}"),
            });
        }
        out
    }

    pub fn open(&mut self, id: EndId, tuple: Tuple, min: u32) -> Vec<String> {
        self.pairing.handle_open(id, 1, tuple, min);
        self.done()
    }

    pub fn open_both(&mut self, min: u32) {
        self.open(A, a_to_b(), min);
        self.open(B, a_to_b().mirrored(), min);
    }

    fn committed(&mut self) -> u32 {
        self.open_both(1);
        let generation = self.pairing.parties.keys().next().unwrap().1;
        self.pairing.handle_prepared(A, generation);
        self.pairing.handle_prepared(B, generation);
        assert_eq!(self.done().len(), 2);
        generation
    }

    pub fn left(&mut self, id: EndId, generation: u32) -> Vec<String> {
        self.pairing.handle_left(id, generation);
        self.done()
    }
}

#[test]
fn both_orders_of_opening_pair_with_the_larger_generation() {
    for (first, second) in [(A, B), (B, A)] {
        let mut one = One::new();
        let of = |id| if id == A { a_to_b() } else { a_to_b().mirrored() };
        let name = |id: EndId| format!("{}/{}", id.vport, id.conn);
        assert_eq!(one.open(first, of(first), 4), [format!("{} declined peer-not-open", name(first))]);
        assert_eq!(one.open(second, of(second), 9), ["0/1 prepare 9 side 0", "1/2 prepare 9 side 1"]);
        one.pairing.handle_prepared(second, 9);
        assert!(one.done().is_empty());
        one.pairing.handle_prepared(first, 9);
        assert_eq!(one.done(), ["0/1 commit 9", "1/2 commit 9"]);
        assert_eq!(one.pairing.lanes().direct, 1);
    }
}

#[test]
fn tenants_tuples_and_addresses_are_checked() {
    let mut one = One::new();
    one.open(A, a_to_b(), 1);
    let c = EndId { vport: 2, conn: 1 };
    assert_eq!(one.open(c, a_to_b().mirrored(), 1), ["2/1 declined peer-unknown"]);
    let spoof = EndId { vport: 0, conn: 7 };
    assert_eq!(one.open(spoof, a_to_b().mirrored(), 1), ["0/7 declined address-not-yours"]);
    assert_eq!(one.open(EndId { conn: 8, ..A }, a_to_b(), 1), ["0/8 declined tuple-taken"]);
    let loop_back = tuple("198.51.100.1:1", "198.51.100.1:2");
    assert_eq!(one.open(EndId { conn: 9, ..A }, loop_back, 1), ["0/9 declined peer-unknown"]);
    let nowhere = tuple("198.51.100.1:1", "203.0.113.9:2");
    assert_eq!(one.open(EndId { conn: 10, ..A }, nowhere, 1), ["0/10 declined peer-unknown"]);
    let another = tuple("198.51.100.1:5", "198.51.100.2:5");
    assert_eq!(one.open(EndId { conn: 11, ..A }, another, 1), ["0/11 declined quota"]);
    assert_eq!(one.pairing.open_connections(0), 3);
}

#[test]
fn at_its_quota_a_guest_takes_one_that_is_awaited_for_one_that_waits() {
    let mut one = One::new();
    let port = |n: u32| tuple(&format!("198.51.100.1:{n}"), "198.51.100.2:80");
    let end = |vport, conn: u64| EndId { vport, conn };
    (1..=3).for_each(|n| drop(one.open(end(0, n), port(n as u32), 1)));
    assert_eq!(one.open(end(0, 4), port(4), 1), ["0/4 declined quota"]);
    assert_eq!(one.open(end(1, 4), port(4).mirrored(), 1), ["1/4 declined peer-not-open"]);
    let met = one.open(end(0, 4), port(4), 1);
    assert_eq!(met, ["0/1 declined quota", "0/4 prepare 1 side 0", "1/4 prepare 1 side 1"]);
    assert_eq!(one.pairing.open_connections(0), 3);
    // One that has met its far end does not make room.
    for n in [2, 3] {
        assert_eq!(one.open(end(1, n), port(n as u32).mirrored(), 1).len(), 2);
    }
    one.pairing.handle_close(end(1, 4));
    one.done();
    assert_eq!(one.open(end(1, 5), port(5).mirrored(), 1), ["1/5 declined peer-not-open"]);
    assert_eq!(one.open(end(0, 5), port(5), 1), ["0/5 declined quota"]);
}

#[test]
fn no_memory_is_a_quota_and_a_new_open_tries_again() {
    let mut one = One::new();
    one.segs.empty = true;
    one.open(A, a_to_b(), 1);
    assert_eq!(one.open(B, a_to_b().mirrored(), 1), ["0/1 declined quota", "1/2 declined quota"]);
    one.segs.empty = false;
    assert_eq!(one.open(B, a_to_b().mirrored(), 1).len(), 2);
}

/// One that is about to leave for a reason takes the other along, and its memory is kept until both have left.
#[test]
fn an_end_that_is_about_to_leave_takes_the_other_along() {
    let mut one = One::new();
    let g = one.committed();
    one.pairing.handle_leaving(A, g + 1, Reason::Inherited);
    assert!(one.done().is_empty(), "another generation");
    for expected in [vec![format!("1/2 withdraw {g} inherited")], vec![]] {
        one.pairing.handle_leaving(A, g, Reason::Inherited);
        assert_eq!(one.done(), expected);
    }
    assert!(one.left(B, g).is_empty());
    assert_eq!(one.left(A, g), ["release to reuse"]);
}

#[test]
fn a_segment_is_free_when_both_have_left() {
    let mut one = One::new();
    let g = one.committed();
    assert_eq!(one.left(A, g), [format!("1/2 withdraw {g} peer-left")]);
    assert!(one.open(A, a_to_b(), g + 1).contains(&"0/1 declined peer-not-open".to_owned()));
    assert_eq!(one.left(B, g), ["release to reuse"]);
    let again = one.open(B, a_to_b().mirrored(), 1);
    assert_eq!(again, [format!("0/1 prepare {} side 0", g + 1), format!("1/2 prepare {} side 1", g + 1)]);
}

#[test]
fn opening_again_before_leaving_counts_when_it_has_left() {
    let mut one = One::new();
    let g = one.committed();
    assert!(one.open(A, a_to_b(), g + 1).is_empty());
    assert!(one.open(B, a_to_b().mirrored(), g + 1).is_empty());
    one.left(A, g);
    let after = one.left(B, g);
    assert!(after.contains(&format!("0/1 prepare {} side 0", g + 1)), "{after:?}");
}

#[test]
fn busy_is_asked_again_often_others_wait_for_an_open() {
    let tries = u32::from(TRIES);
    let mut one = One::new();
    one.open_both(1);
    for generation in 1..=tries {
        one.pairing.handle_prepared(A, generation);
        one.pairing.handle_refused(B, generation, Reason::Busy, one.now);
        assert_eq!(one.done(), [format!("0/1 withdraw {generation} busy")]);
        assert!(one.left(A, generation).contains(&"release to reuse".to_owned()));
        one.pairing.handle_timeout(one.now + REST - Duration::from_millis(1));
        assert!(one.done().is_empty());
        one.now = one.pairing.next_deadline().unwrap();
        one.pairing.handle_timeout(one.now);
        let asked = one.done();
        assert!(asked.contains(&format!("1/2 prepare {} side 1", generation + 1)), "{asked:?}");
    }
    one.pairing.handle_refused(B, tries + 1, Reason::Busy, one.now);
    one.done();
    one.left(A, tries + 1);
    assert_eq!(one.pairing.next_deadline(), None);
    one.open(A, a_to_b(), 1);
    assert_eq!(one.open(B, a_to_b().mirrored(), 1).len(), 2, "a new open counts anew");
    one.pairing.handle_refused(B, tries + 2, Reason::Untrackable, one.now);
    assert_eq!(one.done(), [format!("0/1 withdraw {} untrackable", tries + 2)]);
    assert_eq!(one.left(A, tries + 2), ["release to reuse"]);
}

#[test]
fn closing_waits_for_left_before_the_segment_is_free() {
    let mut one = One::new();
    let g = one.committed();
    one.pairing.handle_close(A);
    assert_eq!(one.done(), [format!("1/2 withdraw {g} ending")]);
    assert!(one.left(B, g).is_empty());
    one.open(A, a_to_b(), 1);
    assert_eq!(one.open(B, a_to_b().mirrored(), 1)[0], format!("0/1 prepare {} side 0", g + 1));
    assert_eq!(one.left(A, g), ["release to reuse"]);
}

#[test]
fn a_dead_agents_segment_is_lost() {
    for late in [false, true] {
        let mut one = One::new();
        let g = one.committed();
        if late {
            one.pairing.handle_close(A);
            one.done();
        }
        one.pairing.handle_detached(0);
        let reason = if late { vec![] } else { vec![format!("1/2 withdraw {g} peer-left")] };
        assert_eq!(one.done(), reason);
        assert_eq!(one.left(B, g), ["release lost"]);
        assert_eq!((one.pairing.stays(), one.pairing.open_connections(0)), (0, 0));
    }
}

#[test]
fn messages_of_another_generation_or_state_change_nothing() {
    let mut one = One::new();
    let g = one.committed();
    one.pairing.handle_prepared(A, g);
    one.pairing.handle_prepared(A, g + 1);
    one.pairing.handle_left(A, g - 1);
    one.pairing.handle_left(EndId { vport: 9, conn: 9 }, g);
    one.pairing.handle_refused(B, g + 5, Reason::Busy, one.now);
    one.pairing.handle_close(EndId { vport: 9, conn: 9 });
    assert!(one.done().is_empty());
    assert_eq!(one.pairing.lanes().direct, 1);
    one.pairing.handle_left(A, g);
    one.pairing.handle_left(A, g);
    one.pairing.handle_prepared(B, g);
    assert_eq!(one.done(), [format!("1/2 withdraw {g} peer-left")]);
}

#[test]
fn a_drained_vport_stays_on_tcp_until_it_is_not() {
    let mut one = One::new();
    let g = one.committed();
    assert!(one.pairing.handle_drain(0, true));
    assert_eq!(one.done(), ["0/0 withdraw 0 drained".to_owned(), format!("1/2 withdraw {g} drained")]);
    one.left(A, g);
    one.left(B, g);
    assert_eq!(one.open(A, a_to_b(), 1), ["0/1 declined drained"]);
    assert_eq!(one.open(B, a_to_b().mirrored(), 1), ["1/2 declined drained"]);
    assert!(one.pairing.handle_drain(0, false));
    assert_eq!(one.done().len(), 2);
    assert!(!one.pairing.handle_drain(77, true));
}

#[test]
fn the_last_generation_is_not_used() {
    let mut one = One::new();
    one.open(A, a_to_b(), u32::MAX);
    assert_eq!(one.open(B, a_to_b().mirrored(), 1), ["0/1 declined violation", "1/2 declined violation"]);
}

#[test]
fn direct_lanes_outlive_an_orderly_end() {
    let mut one = One::new();
    one.committed();
    one.pairing.handle_stop(Reason::BackendGone);
    assert!(one.done().is_empty());
    assert_eq!(one.pairing.carried_stays(), 0);
}

#[test]
fn memory_that_is_coming_is_waited_for_and_none_is_a_reason() {
    let mut one = One::new();
    one.segs.there = Some(0);
    one.open_both(1);
    assert!(one.done().is_empty());
    one.segs.there = Some(1);
    one.pairing.handle_memory((0, 2));
    assert!(one.done().is_empty(), "another program's");
    one.pairing.handle_memory((0, 1));
    assert_eq!(one.done().len(), 2);
    let mut one = One::new();
    one.segs.there = Some(0);
    one.open_both(1);
    (one.segs.there, one.segs.empty) = (None, true);
    one.pairing.handle_memory((1, 1));
    assert_eq!(one.done(), ["0/1 declined quota", "1/2 declined quota"]);
}
