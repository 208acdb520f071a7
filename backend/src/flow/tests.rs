use std::collections::VecDeque;
use std::sync::Arc;

use vsocket_channel::Side;
use vsocket_channel::layout::Geometry;
use vsocket_vxlan::{PayloadAt, decapsulate};

use super::*;
use crate::slab::{Memory, Pool, Segments, SlabKey};

/// A segment of a slab with rings of `ring` bytes, and the guest's own indices.
struct Guest {
    _pool: Pool,
    view: View,
    memory: Arc<Memory>,
    head: u64,
    tail: u64,
}

impl Guest {
    fn new(ring: u64) -> Self {
        let mut pool = Pool::default();
        let id = pool.take(SlabKey::Fabric((0, 1), 0), ring).segment().unwrap();
        let (view, memory) = (pool.view(id).unwrap(), pool.slab(id.slab).unwrap().memory.clone());
        assert_eq!(memory.geometry(), Geometry::new(16, ring).unwrap());
        Self { _pool: pool, view, memory, head: 0, tail: 0 }
    }

    fn directions(&self) -> &[Direction; 2] {
        &self.view.header().directions
    }

    fn open(&mut self, start: u64) {
        self.head = start;
        assert!(self.directions()[0].publish_stay(LaneStay { generation: 3, start, escape: b'e' }));
    }

    /// Writes as much of `bytes` as has room; how much.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let ring = Ring { indices: &self.directions()[0], bytes: &self.view.rings[0] };
        let n = ring.space(self.head).unwrap().min(bytes.len());
        ring.bytes.put(self.head, &bytes[..n]);
        ring.publish(self.head + n as u64);
        self.head += n as u64;
        n
    }

    /// Reads up to `most` bytes.
    fn read(&mut self, most: usize) -> Vec<u8> {
        if self.tail == 0 {
            let Some(stay) = self.directions()[1].stay(3) else { return vec![] };
            self.tail = stay.start;
        }
        let ring = Ring { indices: &self.directions()[1], bytes: &self.view.rings[1] };
        let mut got = vec![0; ring.available(self.tail).unwrap().min(most)];
        ring.bytes.get(self.tail, &mut got);
        ring.release(self.tail + got.len() as u64);
        self.tail += got.len() as u64;
        got
    }
}

/// Two flows and the wire between them, in order: messages, and WRITEs that land at once.
struct Wire {
    flows: [Flow; 2],
    guests: [Guest; 2],
    messages: [VecDeque<(Vec<u8>, Vec<u8>)>; 2],
    room: usize,
    writes: usize,
    rings: usize,
    drops: Vec<Fault>,
    ended: [bool; 2],
}

struct Out<'a> {
    messages: &'a mut VecDeque<(Vec<u8>, Vec<u8>)>,
    from: &'a Arc<Memory>,
    to: &'a View,
    room: &'a mut usize,
    writes: &'a mut usize,
    rings: &'a mut usize,
}

impl Out<'_> {
    fn take_room(&mut self) -> bool {
        let had = *self.room;
        *self.room = had.saturating_sub(1);
        had > 0
    }
}

impl Transmit for Out<'_> {
    fn send(&mut self, header: &[u8], payload: &[u8]) -> bool {
        if self.take_room() {
            self.messages.push_back((header.to_vec(), payload.to_vec()));
            return true;
        }
        false
    }

    fn write(&mut self, offset: usize, place: u64, len: usize) -> bool {
        if !self.take_room() {
            return false;
        }
        assert!(place as usize + len <= self.to.rings[1].len());
        let mut bytes = vec![0; len];
        assert!(self.from.region().copy_out(offset, &mut bytes));
        self.to.rings[1].put(place, &bytes);
        *self.writes += 1;
        true
    }

    fn ring(&mut self, _bell: usize) {
        *self.rings += 1;
    }
}

fn identity(local: &str, remote: &str) -> Identity {
    let tuple = Tuple::new(local.parse().unwrap(), remote.parse().unwrap());
    let macs = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
    Identity { vni: Vni::new(100).unwrap(), macs, tuple, generation: 3 }
}

impl Wire {
    fn new(rings: [u64; 2]) -> Self {
        let guests = rings.map(Guest::new);
        let (a, b) = ("198.51.100.1:4000", "198.51.100.3:80");
        let mut flows = [
            Flow::new(identity(a, b), guests[0].view.clone()),
            Flow::new(identity(b, a), guests[1].view.clone()),
        ];
        flows[0].ready(rings[1]);
        flows[1].ready(rings[0]);
        let messages = [VecDeque::new(), VecDeque::new()];
        let (room, drops) = (usize::MAX, vec![]);
        Self { flows, guests, messages, room, writes: 0, rings: 0, drops, ended: [false; 2] }
    }

    fn pump(&mut self, n: usize) -> Result<bool, BadIndex> {
        let mut out = Out {
            messages: &mut self.messages[1 - n],
            from: &self.guests[n].memory,
            to: &self.guests[1 - n].view,
            room: &mut self.room,
            writes: &mut self.writes,
            rings: &mut self.rings,
        };
        self.flows[n].pump(&mut out, true)
    }

    fn deliver(&mut self, n: usize) {
        while let Some((header, payload)) = self.messages[n].pop_front() {
            let whole = [header, payload.clone()].concat();
            let (segment, len, inline) = match decapsulate(&whole, PayloadAt::Inline) {
                Ok((segment, _, len)) => (segment, len, true),
                Err(_) => {
                    let (segment, _, len) = decapsulate(&whole, PayloadAt::Elsewhere).unwrap();
                    (segment, len, false)
                }
            };
            assert_eq!(inline && len > 0, segment.flags.contains(Flags::PSH));
            match self.flows[n].handle(&segment, inline.then_some(&payload), len) {
                Ok(Heard::Segment) => {}
                Ok(Heard::End) => self.ended[n] = true,
                Err(fault) => self.drops.push(fault),
            }
        }
    }

    /// Until nothing moves.
    fn run(&mut self) {
        loop {
            let worked = [self.pump(0).unwrap(), self.pump(1).unwrap()];
            self.deliver(0);
            self.deliver(1);
            if worked == [false; 2] {
                return;
            }
        }
    }
}

fn stream(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect()
}

#[test]
fn a_stay_opens_is_confirmed_and_carries_bytes() {
    let mut wire = Wire::new([1 << 14; 2]);
    wire.guests[0].open(1 << 40);
    wire.guests[0].write(b"hello");
    wire.run();
    let stay = LaneStay { generation: 3, start: 1 << 40, escape: b'e' };
    assert_eq!(wire.guests[1].directions()[1].stay(3), Some(stay));
    assert_eq!(wire.guests[0].directions()[0].reader.confirmed.load(Ordering::Relaxed), 3);
    assert_eq!(wire.guests[1].read(100), b"hello");
    assert_eq!(wire.guests[0].directions()[0].tail.tail.load(Ordering::Relaxed), (1 << 40) + 5);
    assert!(!wire.flows[0].is_waiting() && wire.drops.is_empty());
    assert_eq!(wire.flows[0].traffic.tx_bytes, 5);
    assert_eq!(wire.flows[1].traffic.rx_bytes, 5);
    wire.guests[0].write(&[7; 8000]);
    wire.run();
    let taken = |wire: &Wire| wire.guests[0].directions()[0].reader.taken.load(Ordering::Relaxed) - (1 << 40);
    assert!(taken(&wire) <= 5, "nobody has read so much");
    assert_eq!(wire.guests[1].read(8000).len(), 8000);
    wire.guests[0].write(b"!");
    wire.run();
    assert!((4096..=8005).contains(&taken(&wire)), "{}", taken(&wire));
}

/// A capture looks where a header says its payload is, whatever it says.
#[test]
fn what_has_gone_ahead_is_found_in_the_ring() {
    let mut wire = Wire::new([1 << 14; 2]);
    wire.guests[0].open((1 << 40) - 2);
    wire.guests[0].write(b"hello");
    wire.run();
    let bytes = |seq: u32, len: usize| {
        let Payload::Ring(ring, at, len) = wire.flows[1].ahead(seq, len) else { panic!() };
        let mut got = vec![0; len];
        ring.get(at, &mut got);
        got
    };
    assert_eq!(bytes(u32::MAX - 1, 5), b"hello");
    assert_eq!(bytes(0, 3), b"llo");
    assert_eq!(bytes(0, 1 << 20).len(), 1 << 14);
    assert_eq!(bytes((1 << 31) + 100, 4), [0; 4]);
}

/// Both directions, rings of different length, random sizes, room that runs out in the middle: every byte, in order.
#[test]
fn streams_cross_with_wrapping_rings_and_little_room() {
    const TOTAL: usize = 3 << 20;
    for (seed, rings) in [(1u64, [1 << 14, 1 << 16]), (2, [1 << 17, 1 << 15]), (3, [1 << 16, 1 << 16])] {
        let mut wire = Wire::new(rings);
        let starts = [u64::from(u32::MAX) - 5000, u64::MAX - 70_000];
        let mut random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let mut next = move |bound: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % bound as u64) as usize
        };
        let sent = [stream(seed, TOTAL), stream(seed + 9, TOTAL)];
        let (mut at, mut got) = ([0usize; 2], [vec![], vec![]]);
        for (guest, start) in wire.guests.iter_mut().zip(starts) {
            guest.tail = 0;
            guest.head = start;
            let stay = LaneStay { generation: 3, start, escape: 0 };
            assert!(guest.directions()[0].publish_stay(stay));
        }
        while got.iter().any(|g| g.len() < TOTAL) {
            for n in 0..2 {
                let piece = &sent[n][at[n]..(at[n] + next(100_000)).min(TOTAL)];
                let guest = &mut wire.guests[n];
                let ring = Ring { indices: &guest.view.header().directions[0], bytes: &guest.view.rings[0] };
                let count = ring.space(guest.head).unwrap().min(piece.len());
                ring.bytes.put(guest.head, &piece[..count]);
                guest.head = guest.head.wrapping_add(count as u64);
                ring.publish(guest.head);
                at[n] += count;
                wire.room = next(7);
                wire.pump(n).unwrap();
                wire.deliver(1 - n);
                let guest = &mut wire.guests[1 - n];
                let Some(stay) = guest.view.header().directions[1].stay(3) else { continue };
                let tail = stay.start.wrapping_add(got[n].len() as u64);
                let ring = Ring { indices: &guest.view.header().directions[1], bytes: &guest.view.rings[1] };
                let mut bytes = vec![0; ring.available(tail).unwrap().min(next(90_000))];
                ring.bytes.get(tail, &mut bytes);
                ring.release(tail.wrapping_add(bytes.len() as u64));
                got[n].extend(bytes);
            }
        }
        assert!(got == sent, "seed {seed}");
        assert!(wire.writes > 10 && wire.drops.is_empty(), "{:?}", wire.drops);
    }
}

#[test]
fn a_full_ring_stops_the_sender_and_its_reader_starts_it_again() {
    let mut wire = Wire::new([1 << 16, 1 << 14]);
    wire.guests[0].open(7);
    let bytes = stream(7, 40_000);
    assert_eq!(wire.guests[0].write(&bytes), 40_000);
    wire.run();
    assert!(!wire.flows[0].is_waiting(), "what the window allowed is acknowledged");
    assert_eq!(wire.flows[1].traffic.rx_bytes, 1 << 14);
    wire.flows[1].arm();
    assert_eq!(wire.guests[1].directions()[1].stay.want_space.load(Ordering::Relaxed), 1);
    let mut got = wire.guests[1].read(1000);
    wire.run();
    assert_eq!(wire.flows[1].traffic.rx_bytes, 1 << 14, "not for so little");
    while got.len() < 40_000 {
        got.extend(wire.guests[1].read(5000));
        wire.run();
    }
    assert!(got == bytes);
}

#[test]
fn the_guest_is_rung_only_if_it_sleeps() {
    let mut wire = Wire::new([1 << 14; 2]);
    wire.guests[0].open(1);
    wire.guests[1].view.header().waiters[0].mask.store(0b10, Ordering::Relaxed);
    wire.guests[0].write(b"a");
    wire.run();
    assert_eq!(wire.rings, 0);
    wire.guests[1].view.slab().bells[0][1].announce();
    wire.guests[0].write(b"b");
    wire.run();
    assert_eq!(wire.rings, 1);
    wire.guests[0].write(b"c");
    wire.run();
    assert_eq!(wire.rings, 1);
}

#[test]
fn space_is_announced_when_there_is_enough() {
    let mut wire = Wire::new([1 << 14, 1 << 14]);
    wire.guests[0].view.header().waiters[0].mask.store(1, Ordering::Relaxed);
    wire.guests[0].open(1);
    wire.guests[0].write(&stream(0, 1 << 14));
    wire.run();
    assert_eq!(wire.guests[0].write(&stream(0, 1 << 14)), 1 << 14, "the far ring holds the first");
    wire.guests[0].directions()[0].stay.want_space.store(1, Ordering::Relaxed);
    wire.guests[0].view.slab().bells[0][0].announce();
    wire.run();
    assert_eq!(wire.rings, 0);
    wire.guests[1].read(1 << 13);
    wire.run();
    assert_eq!(wire.rings, 1);
    assert_eq!(wire.guests[0].directions()[0].stay.want_space.load(Ordering::Relaxed), 0);
}

#[test]
fn a_stay_that_comes_too_late_is_refused() {
    let mut wire = Wire::new([1 << 14; 2]);
    assert!(wire.guests[1].directions()[1].close_unopened(3));
    wire.guests[0].open(1);
    wire.guests[0].write(b"nobody takes this");
    wire.run();
    let reader = &wire.guests[0].directions()[0].reader;
    assert_eq!(reader.sealed.load(Ordering::Relaxed), 1);
    assert_eq!(reader.closed.load(Ordering::Relaxed), 0);
    assert_eq!(reader.confirmed.load(Ordering::Relaxed), 0);
    assert_eq!(wire.drops, [Fault::Peer(Drop::ReaderGone)]);
    assert!(!wire.flows[0].is_waiting());
}

#[test]
fn a_reader_that_has_gone_is_told_to_the_sender() {
    let mut wire = Wire::new([1 << 14; 2]);
    wire.guests[0].open(1);
    wire.guests[0].write(b"read");
    wire.run();
    wire.guests[1].directions()[1].reader.closed.store(1, Ordering::Relaxed);
    for _ in 0..3 {
        wire.guests[0].write(b"unread");
        wire.run();
    }
    let reader = &wire.guests[0].directions()[0].reader;
    assert_eq!((reader.closed.load(Ordering::Relaxed), reader.sealed.load(Ordering::Relaxed)), (1, 0));
    assert!(wire.drops.iter().all(|d| *d == Fault::Peer(Drop::ReaderGone)) && !wire.drops.is_empty());
}

#[test]
fn a_sender_of_nothing_is_told_too_that_the_reader_has_gone() {
    let mut wire = Wire::new([1 << 14; 2]);
    wire.guests[0].open(1);
    wire.guests[0].write(b"read");
    wire.run();
    wire.guests[1].directions()[1].reader.closed.store(1, Ordering::Relaxed);
    wire.run();
    let direction = &wire.guests[0].directions()[0];
    assert_eq!(direction.reader.closed.load(Ordering::Relaxed), 1);
    assert_eq!(direction.tail.tail.load(Ordering::Relaxed), 5, "all of it is acknowledged");
    assert!(wire.drops.is_empty());
}

#[test]
fn a_stopped_flow_says_so_last_and_takes_nothing() {
    let mut wire = Wire::new([1 << 14; 2]);
    wire.guests[0].open(1);
    wire.run();
    wire.flows[0].stop();
    wire.guests[0].write(b"too late");
    wire.run();
    assert_eq!(wire.ended, [false, true]);
    wire.guests[1].open(1);
    wire.run();
    assert!(wire.drops.iter().all(|d| *d == Fault::Peer(Drop::Stopped)) && !wire.drops.is_empty());
    assert_eq!(wire.flows[1].traffic.rx_bytes, 0);
}

#[test]
fn hostile_indices_end_the_flow() {
    let index = |set: fn(&Guest)| {
        let mut wire = Wire::new([1 << 14; 2]);
        wire.guests[0].open(100);
        wire.guests[1].open(100);
        wire.guests[0].write(b"0123456789");
        wire.guests[1].write(b"0123456789");
        wire.run();
        set(&wire.guests[0]);
        wire.pump(0).is_err()
    };
    assert!(!index(|_| {}));
    assert!(index(|g| g.directions()[0].head.head.store(100, Ordering::Relaxed)), "head moves back");
    assert!(index(|g| g.directions()[0].head.head.store(u64::MAX, Ordering::Relaxed)), "head far ahead");
    assert!(index(|g| g.directions()[0].head.head.store(111 + (1 << 14), Ordering::Relaxed)), "one too far");
    assert!(index(|g| g.directions()[1].tail.tail.store(111, Ordering::Relaxed)), "reads what is not there");
    assert!(!index(|g| g.directions()[1].tail.tail.store(0, Ordering::Relaxed)), "tail back: less space");
}

#[test]
fn hostile_segments_are_dropped_by_name() {
    let base = |wire: &Wire| Segment {
        vni: Vni::new(100).unwrap(),
        src_mac: [2; 6],
        dst_mac: [2; 6],
        src: wire.flows[1].identity.tuple.remote,
        dst: wire.flows[1].identity.tuple.local,
        seq: 100,
        ack: 100,
        window: 1 << 14,
        flags: Flags::empty(),
        stay: Stay { generation: 3, open: None },
    };
    let try_it = |change: fn(&mut Segment), len: usize| {
        let mut wire = Wire::new([1 << 14; 2]);
        wire.guests[0].open(100);
        wire.guests[1].open(100);
        wire.run();
        let mut segment = base(&wire);
        change(&mut segment);
        let payload = vec![0; len];
        let result = wire.flows[1].handle(&segment, Some(&payload), len);
        assert_eq!(wire.flows[1].traffic.rx_bytes, if result.is_ok() { len as u64 } else { 0 });
        result
    };
    let open = Some(StayOpen { start: 1, escape: 1 });
    assert_eq!(try_it(|_| {}, 5), Ok(Heard::Segment));
    assert_eq!(try_it(|s| s.seq = 101, 5), Err(Fault::Peer(Drop::Sequence)));
    assert_eq!(try_it(|s| s.seq = 99, 5), Err(Fault::Peer(Drop::Sequence)));
    assert_eq!(try_it(|_| {}, (1 << 14) + 1), Err(Fault::Peer(Drop::Window)));
    assert_eq!(try_it(|s| (s.flags, s.ack) = (Flags::ACK, 101), 0), Err(Fault::Peer(Drop::Acknowledgement)));
    assert_eq!(try_it(|s| s.flags = Flags::SYN, 0), Err(Fault::Peer(Drop::Open)));
    assert!(open.is_some() && try_it(|s| s.stay.open = Some(StayOpen { start: 1, escape: 1 }), 0).is_ok());
    let mut fresh = Wire::new([1 << 14; 2]);
    let segment = base(&fresh);
    assert_eq!(fresh.flows[1].handle(&segment, Some(b"x"), 1), Err(Fault::Peer(Drop::NoStay)));
    assert_eq!(
        fresh.flows[1].handle(&Segment { flags: Flags::ACK, ..segment }, None, 0),
        Err(Fault::Peer(Drop::Acknowledgement))
    );
}

#[test]
fn rings_are_where_the_geometry_says() {
    let guest = Guest::new(1 << 14);
    guest.view.rings[0].put(0, b"here");
    let mut got = [0; 4];
    assert!(guest.memory.region().copy_out(guest.view.ring_offset(Side::Zero), &mut got));
    assert_eq!(&got, b"here");
}
