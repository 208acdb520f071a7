use std::sync::Arc;

use vsocket_channel::lane::Stay;
use vsocket_channel::layout::Direction;

use super::*;
use crate::slab::{Memory, Pool, Segments, SlabKey};

const RING: u64 = 1 << 14;

/// A guest's segment, and its own indices.
struct Guest {
    _pool: Pool,
    memory: Arc<Memory>,
    view: View,
    head: u64,
    tail: Option<u64>,
}

impl Guest {
    fn new(ring: u64) -> Self {
        let mut pool = Pool::default();
        let id = pool.take(SlabKey::Fabric((0, 1), RELAY), ring).segment().unwrap();
        let (view, memory) = (pool.view(id).unwrap(), pool.slab(id.slab).unwrap().memory.clone());
        view.header().waiters[0].mask.store(0b10, Ordering::Relaxed);
        Self { _pool: pool, memory, view, head: 0, tail: None }
    }

    fn direction(&self, n: usize) -> &Direction {
        &self.view.header().directions[n]
    }

    fn ring(&self, n: usize) -> Ring<'_> {
        Ring { indices: self.direction(n), bytes: &self.view.rings[n] }
    }

    fn open(&mut self, start: u64) {
        self.head = start;
        assert!(self.direction(0).publish_stay(Stay { generation: 3, start, escape: b'e' }));
    }

    /// Writes as much of `bytes` as has room; how much.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let n = self.ring(0).space(self.head).unwrap().min(bytes.len());
        self.view.rings[0].put(self.head, &bytes[..n]);
        self.head = self.head.wrapping_add(n as u64);
        self.ring(0).publish(self.head);
        n
    }

    fn read(&mut self, most: usize) -> Vec<u8> {
        let Some(stay) = self.direction(1).stay(3) else { return vec![] };
        let tail = self.tail.unwrap_or(stay.start);
        let mut got = vec![0; self.ring(1).available(tail).unwrap().min(most)];
        self.view.rings[1].get(tail, &mut got);
        let tail = tail.wrapping_add(got.len() as u64);
        self.ring(1).release(tail);
        self.tail = Some(tail);
        got
    }

    /// It waits at its bell.
    fn sleeps(&self) {
        self.view.slab().bells[0][1].announce();
    }

    fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.geometry().slab_len()];
        assert!(self.memory.region().copy_out(0, &mut bytes));
        bytes
    }

    fn word(&self, n: usize, word: fn(&Direction) -> u32) -> u32 {
        word(self.direction(n))
    }
}

/// Two guests and the relay between them.
struct Two {
    guests: [Guest; 2],
    relay: Relay,
    /// Rings: the guest and the bell.
    rings: Vec<(usize, usize)>,
}

impl Two {
    fn new(rings: [u64; 2]) -> Self {
        let guests = rings.map(Guest::new);
        let relay = Relay::new(3, [guests[0].view.clone(), guests[1].view.clone()]);
        Self { guests, relay, rings: vec![] }
    }

    fn opened() -> Self {
        let mut two = Self::new([RING; 2]);
        two.guests[0].open(1 << 40);
        two.guests[1].open(7);
        assert_eq!(two.pump(), [true; 2]);
        two
    }

    fn try_pump(&mut self) -> Result<[bool; 2], BadIndex> {
        let rings = &mut self.rings;
        self.relay.pump(&mut |guest, bell| rings.push((guest, bell)))
    }

    fn pump(&mut self) -> [bool; 2] {
        self.try_pump().unwrap()
    }

    fn run(&mut self) {
        while self.pump() != [false; 2] {}
    }

    fn rings(&mut self) -> Vec<(usize, usize)> {
        std::mem::take(&mut self.rings)
    }
}

fn confirmed(direction: &Direction) -> u32 {
    direction.reader.confirmed.load(Ordering::Relaxed)
}

fn sealed(direction: &Direction) -> u32 {
    direction.reader.sealed.load(Ordering::Relaxed)
}

fn closed(direction: &Direction) -> u32 {
    direction.reader.closed.load(Ordering::Relaxed)
}

fn wanted(direction: &Direction) -> u32 {
    direction.stay.want_space.load(Ordering::Relaxed)
}

fn stream(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

#[test]
fn a_stay_is_passed_on_confirmed_and_carries_bytes() {
    let mut two = Two::new([RING; 2]);
    assert_eq!(two.pump(), [false; 2]);
    two.guests[0].open(1 << 40);
    assert_eq!(two.guests[0].word(0, confirmed), 0);
    assert_eq!(two.pump(), [true, false]);
    let stay = Stay { generation: 3, start: 1 << 40, escape: b'e' };
    assert_eq!(two.guests[1].direction(1).stay(3), Some(stay));
    assert_eq!(two.guests[0].word(0, confirmed), 3);
    two.guests[0].write(b"hello");
    assert_eq!(two.pump(), [true, false]);
    assert_eq!(two.guests[1].read(100), b"hello");
    assert_eq!(two.guests[0].direction(0).tail.tail.load(Ordering::Relaxed), (1 << 40) + 5);
    // The other way begins later, and by itself.
    assert_eq!(two.guests[1].word(0, confirmed), 0);
    two.guests[1].open(9);
    two.guests[1].write(b"hello yourself");
    two.run();
    assert_eq!(two.guests[0].read(100), b"hello yourself");
    let traffic = |tx_bytes, rx_bytes| Traffic { tx_bytes, tx_segments: 1, rx_bytes, rx_segments: 1 };
    assert_eq!(two.relay.traffic, [traffic(5, 14), traffic(14, 5)]);
}

#[test]
fn a_stay_of_another_generation_is_none() {
    let mut two = Two::new([RING; 2]);
    assert!(two.guests[0].direction(0).publish_stay(Stay { generation: 2, start: 0, escape: 0 }));
    two.guests[0].write(b"stale");
    assert_eq!(two.pump(), [false; 2]);
    assert_eq!(two.guests[1].direction(1).stay(2), None);
}

/// Both ways, rings of different length, random sizes, offsets that wrap: every byte, in order.
#[test]
fn streams_cross_with_wrapping_rings() {
    const TOTAL: usize = 3 << 20;
    for (seed, rings) in [(1u64, [1 << 14, 1 << 16]), (2, [1 << 19, 1 << 12]), (3, [1 << 16, 1 << 16])] {
        let mut two = Two::new(rings);
        let mut random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let mut next = move |bound: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % bound as u64) as usize
        };
        let sent = [stream(seed, TOTAL), stream(seed + 9, TOTAL)];
        let (mut at, mut got) = ([0usize; 2], [vec![], vec![]]);
        two.guests[0].open(u64::from(u32::MAX) - 5000);
        two.guests[1].open(u64::MAX - 70_000);
        while got.iter().any(|g| g.len() < TOTAL) {
            for n in 0..2 {
                let end = (at[n] + next(100_000)).min(TOTAL);
                at[n] += two.guests[n].write(&sent[n][at[n]..end]);
                two.pump();
                got[n].extend(two.guests[1 - n].read(next(90_000)));
            }
        }
        assert!(got == sent, "seed {seed}");
        let bytes = two.relay.traffic.map(|t| (t.tx_bytes, t.rx_bytes));
        assert_eq!(bytes, [(TOTAL as u64, TOTAL as u64); 2]);
    }
}

#[test]
fn one_turn_has_its_end() {
    let mut two = Two::new([1 << 20; 2]);
    two.guests[0].open(0);
    two.guests[0].write(&stream(0, 1 << 20));
    two.pump();
    assert_eq!(two.relay.traffic[1].rx_bytes, TURN as u64);
    two.run();
    assert_eq!(two.relay.traffic[1].rx_bytes, 1 << 20);
}

#[test]
fn a_full_ring_stops_the_writer_and_its_reader_starts_it_again() {
    let mut two = Two::opened();
    let bytes = stream(7, 2 * RING as usize);
    let half = RING as usize;
    assert_eq!(two.guests[0].write(&bytes), half);
    two.run();
    two.relay.arm();
    assert_eq!(two.guests[1].word(1, wanted), 0, "nothing waits");
    assert_eq!(two.guests[0].write(&bytes[half..]), half);
    two.run();
    assert_eq!(two.relay.traffic[1].rx_bytes, RING);
    assert_eq!(two.guests[0].ring(0).space(two.guests[0].head), Ok(0), "what is not there is still here");
    two.relay.arm();
    assert_eq!(two.guests[1].word(1, wanted), 1);
    assert_eq!(two.guests[0].word(1, wanted), 0);
    let mut got = vec![];
    while got.len() < bytes.len() {
        got.extend(two.guests[1].read(1000));
        two.pump();
    }
    assert!(got == bytes);
}

#[test]
fn a_guest_is_rung_only_if_it_sleeps() {
    let mut two = Two::opened();
    two.guests[0].write(b"a");
    two.run();
    assert_eq!(two.rings(), []);
    two.guests[1].sleeps();
    two.guests[0].write(b"b");
    two.run();
    assert_eq!(two.rings(), [(1, 1)]);
    two.guests[0].write(b"c");
    two.run();
    assert_eq!(two.rings(), []);
    let mut two = Two::new([RING; 2]);
    two.guests[0].sleeps();
    two.guests[1].open(5);
    two.run();
    assert_eq!(two.rings(), [(0, 1)], "a stay is told too");
}

#[test]
fn room_is_told_when_there_is_enough_and_it_is_waited_for() {
    let mut two = Two::opened();
    let bytes = stream(0, RING as usize);
    two.guests[0].write(&bytes);
    two.run();
    two.guests[0].write(&bytes);
    two.guests[0].direction(0).stay.want_space.store(1, Ordering::Relaxed);
    two.guests[0].sleeps();
    two.guests[1].read(1000);
    two.run();
    assert_eq!((two.rings(), two.guests[0].word(0, wanted)), (vec![], 1), "not for so little");
    two.guests[1].read(RING as usize / 2);
    two.run();
    assert_eq!((two.rings(), two.guests[0].word(0, wanted)), (vec![(0, 1)], 0));
    two.guests[0].sleeps();
    two.guests[1].read(RING as usize);
    two.run();
    assert_eq!(two.rings(), [], "it does not wait");
}

#[test]
fn a_stay_that_comes_too_late_is_refused() {
    let mut two = Two::new([RING; 2]);
    assert!(two.guests[1].direction(1).close_unopened(3));
    two.guests[0].open(1);
    two.guests[0].write(b"nobody takes this");
    two.guests[0].sleeps();
    two.run();
    let words = [sealed, closed, confirmed].map(|word| two.guests[0].word(0, word));
    assert_eq!(words, [1, 0, 0]);
    assert_eq!((two.rings(), two.relay.traffic[0].tx_bytes), (vec![(0, 1)], 0));
    assert_eq!(two.guests[0].direction(0).tail.tail.load(Ordering::Relaxed), 1, "nothing was taken");
    two.guests[1].open(5);
    two.guests[1].write(b"the other way");
    two.run();
    assert_eq!(two.guests[0].read(99), b"the other way");
}

#[test]
fn a_reader_that_has_gone_is_told_to_the_writer() {
    let mut two = Two::opened();
    two.guests[0].write(b"read");
    two.run();
    two.guests[0].sleeps();
    two.guests[1].direction(1).reader.closed.store(1, Ordering::Relaxed);
    two.guests[0].write(b"unread");
    two.run();
    assert_eq!((two.guests[0].word(0, closed), two.guests[0].word(0, sealed)), (1, 0));
    assert_eq!((two.rings(), two.relay.traffic[0].tx_bytes), (vec![(0, 1)], 4));
    two.relay.arm();
    assert_eq!(two.guests[1].word(1, wanted), 0, "no room is waited for");
}

#[test]
fn hostile_indices_end_the_relay() {
    let index = |set: fn(&Guest)| {
        let mut two = Two::new([RING; 2]);
        for n in 0..2 {
            two.guests[n].open(100);
            two.guests[n].write(b"0123456789");
        }
        two.run();
        set(&two.guests[0]);
        two.relay.arm();
        two.try_pump().is_err()
    };
    assert!(!index(|_| {}));
    assert!(index(|g| g.direction(0).head.head.store(100, Ordering::Relaxed)), "head moves back");
    assert!(index(|g| g.direction(0).head.head.store(u64::MAX, Ordering::Relaxed)), "head far ahead");
    assert!(index(|g| g.direction(0).head.head.store(111 + RING, Ordering::Relaxed)), "one too far");
    assert!(index(|g| g.direction(1).tail.tail.store(111, Ordering::Relaxed)), "reads what is not there");
    assert!(!index(|g| g.direction(1).tail.tail.store(0, Ordering::Relaxed)), "tail back: less space");
    assert!(!index(|g| g.direction(0).tail.tail.store(77, Ordering::Relaxed)), "our own words are not read");
    assert!(!index(|g| g.direction(1).head.head.store(77, Ordering::Relaxed)), "nor these");
}

#[test]
fn without_work_only_what_is_armed_changes() {
    let mut two = Two::opened();
    two.guests[0].write(b"some");
    two.run();
    let before = [two.guests[0].image(), two.guests[1].image()];
    assert_eq!(two.pump(), [false; 2]);
    two.relay.arm();
    assert!(before == [two.guests[0].image(), two.guests[1].image()]);
}
