use std::sync::atomic::Ordering;
use std::time::Duration;

use vsocket_channel::bell::publish_fence;
use vsocket_channel::lane::Stay;
use vsocket_channel::ring::Ring;

use super::*;
use crate::relay::RELAY;
use crate::slab::{Pool, SegmentId, Segments, SlabKey, View};

const RING: usize = 1 << 14;
const LATER: Duration = Duration::from_secs(1);

/// A guest's end of a connection.
struct Guest {
    id: SegmentId,
    view: View,
    head: u64,
    tail: Option<u64>,
    /// It has written to the bell.
    rang: bool,
}

impl Guest {
    fn ring(&self, n: usize) -> Ring<'_> {
        Ring { indices: &self.view.header().directions[n], bytes: &self.view.rings[n] }
    }

    /// As a guest does after it has published something.
    fn bell(&mut self) {
        publish_fence();
        self.rang |= self.view.slab().bells[1][0].take();
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.head == 0 {
            self.head = 1;
            let stay = Stay { generation: 3, start: 1, escape: b'e' };
            assert!(self.ring(0).indices.publish_stay(stay));
        }
        assert!(self.ring(0).space(self.head).unwrap() >= bytes.len());
        self.view.rings[0].put(self.head, bytes);
        self.head += bytes.len() as u64;
        self.ring(0).publish(self.head);
        self.bell();
    }

    fn read(&mut self) -> Vec<u8> {
        let Some(stay) = self.ring(1).indices.stay(3) else { return vec![] };
        let tail = self.tail.unwrap_or(stay.start);
        let mut got = vec![0; self.ring(1).available(tail).unwrap()];
        self.view.rings[1].get(tail, &mut got);
        let tail = tail + got.len() as u64;
        self.ring(1).release(tail);
        self.tail = Some(tail);
        publish_fence();
        if self.ring(1).indices.stay.want_space.swap(0, Ordering::AcqRel) != 0 {
            self.bell();
        }
        got
    }

    fn image(&self, pool: &Pool) -> Vec<u8> {
        let memory = &pool.slab(self.id.slab).unwrap().memory;
        let mut bytes = vec![0; memory.geometry().slab_len()];
        assert!(memory.region().copy_out(0, &mut bytes));
        bytes
    }
}

/// A host with pairs of guests; relay n is between the two of pair n.
struct Host {
    relays: Relays,
    drops: Named,
    pool: Pool,
    pairs: Vec<[Guest; 2]>,
}

impl Host {
    /// `programs` says in whose slab each guest's segment is.
    fn with(programs: &[[u64; 2]]) -> Self {
        let (relays, drops, pool) = (Relays::default(), Named::default(), Pool::default());
        let mut host = Self { relays, drops, pool, pairs: vec![] };
        for (n, programs) in programs.iter().enumerate() {
            let each = [(0, programs[0]), (1, programs[1])];
            let ids =
                each.map(|who| host.pool.take(SlabKey::Fabric(who, RELAY), RING as u64).segment().unwrap());
            let views = ids.map(|id| host.pool.view(id).unwrap());
            let relay = Relay::new(3, views.clone());
            let slabs = ids.map(|id| (id.slab, host.pool.slab(id.slab).unwrap()));
            host.relays.add(n as u64, [0, 1], relay, slabs);
            let mut views = views.into_iter();
            let guests = ids.map(|id| {
                let view = views.next().unwrap();
                Guest { id, view, head: 0, tail: None, rang: false }
            });
            host.pairs.push(guests);
        }
        host
    }

    /// Pairs that have exchanged a byte each way, and a host that sleeps.
    fn asleep(programs: &[[u64; 2]]) -> Self {
        let mut host = Self::with(programs);
        for n in 0..programs.len() {
            host.pairs[n].iter_mut().for_each(|guest| guest.write(b"0"));
        }
        host.settle();
        for n in 0..programs.len() {
            assert_eq!(host.pairs[n].each_mut().map(Guest::read), [b"0", b"0"]);
        }
        host.sleep();
        assert!(!host.hear_bells());
        host
    }

    fn settle(&mut self) {
        while self.relays.pass(&mut self.drops) {}
    }

    /// Until it sleeps.
    fn sleep(&mut self) {
        while !self.relays.rest(&mut self.drops) {
            self.settle();
        }
        assert_eq!(self.warm(), 0);
    }

    fn cool(&mut self) {
        let now = Instant::now();
        self.relays.cool(now, &mut self.drops);
        self.relays.cool(now + LATER, &mut self.drops);
    }

    fn hear_bells(&mut self) -> bool {
        let mut rung = false;
        for guest in self.pairs.iter_mut().flatten() {
            if std::mem::take(&mut guest.rang) {
                rung = true;
                self.relays.bell(guest.id.slab);
            }
        }
        rung
    }

    /// How many slabs are looked at.
    fn warm(&self) -> usize {
        (0..).take_while(|n| self.relays.shelves.nth_warm(*n).is_some()).count()
    }
}

#[test]
fn only_the_slab_of_the_one_who_writes_is_warm() {
    let mut host = Host::asleep(&[[1, 1], [2, 2]]);
    host.pairs[0][0].write(b"first");
    host.settle();
    assert_eq!(host.pairs[0][1].read(), b"", "visited though nobody has heard the bell");
    assert!(host.hear_bells());
    host.settle();
    assert_eq!((host.pairs[0][1].read(), host.warm()), (b"first".to_vec(), 1));
    host.pairs[0][0].write(b"second");
    assert!(!host.hear_bells(), "while it is warm, nobody rings");
    host.settle();
    assert_eq!(host.pairs[0][1].read(), b"second");
    host.pairs[0][1].write(b"back");
    assert!(host.hear_bells());
    assert_eq!(host.warm(), 2);
    host.settle();
    assert_eq!(host.pairs[0][0].read(), b"back");
}

/// One visit finds what both have written; it keeps both slabs warm.
#[test]
fn a_slab_stays_warm_by_what_its_own_guest_does() {
    let mut host = Host::asleep(&[[1, 1]]);
    host.pairs[0].iter_mut().for_each(|guest| guest.write(b"1"));
    host.hear_bells();
    let begun = Instant::now();
    host.settle();
    host.relays.cool(begun, &mut host.drops);
    host.pairs[0].iter_mut().for_each(|guest| guest.write(b"2"));
    host.settle();
    host.relays.cool(begun + LATER, &mut host.drops);
    assert_eq!(host.warm(), 2);
    host.pairs[0][0].write(b"3");
    host.settle();
    host.relays.cool(begun + LATER * 2, &mut host.drops);
    assert_eq!(host.warm(), 1, "the other has written nothing");
    assert_eq!(host.pairs[0].each_mut().map(Guest::read), [b"12".to_vec(), b"123".to_vec()]);
}

/// Dekker's case: who publishes just before the announcement does not ring, so the look after it must find the bytes.
#[test]
fn what_was_published_before_the_announcement_is_found_by_the_look() {
    for side in 0..2 {
        let mut host = Host::asleep(&[[1, 1]]);
        host.pairs[0][side].write(b"1");
        assert!(host.hear_bells());
        host.settle();
        for idle in [false, true] {
            host.pairs[0][side].write(b"2");
            if idle {
                assert!(!host.relays.rest(&mut host.drops), "slept upon bytes");
            } else {
                host.cool();
            }
            assert_eq!(host.warm(), 1);
            assert!(!host.hear_bells());
            host.settle();
        }
        assert_eq!(host.pairs[0][1 - side].read(), b"122");
    }
}

#[test]
fn a_slab_that_cools_while_others_work_hears_its_bell() {
    let mut host = Host::asleep(&[[1, 1]]);
    for n in 0..3 {
        host.pairs[0][1].write(&[n]);
        assert!(host.hear_bells(), "round {n}");
        host.settle();
        host.cool();
        assert_eq!((host.warm(), host.pairs[0][0].read()), (0, vec![n]));
    }
}

/// A reader makes room in a slab that is cold: the relay, which waits for it, hears of it, however the writer's turned cold.
#[test]
fn room_made_in_a_cold_slab_is_told() {
    for idle in [false, true] {
        let mut host = Host::asleep(&[[1, 1]]);
        host.pairs[0][0].write(&[1; RING]);
        host.hear_bells();
        host.settle();
        host.sleep();
        host.pairs[0][0].write(&[2; RING]);
        assert!(host.hear_bells());
        host.settle();
        assert_eq!(host.warm(), 1);
        if idle {
            host.sleep();
        } else {
            host.cool();
        }
        assert_eq!((host.warm(), host.pairs[0][1].read()), (0, vec![1; RING]));
        assert!(host.hear_bells(), "nobody was asked to tell of the room");
        host.settle();
        assert_eq!(host.pairs[0][1].read(), [2; RING]);
    }
}

#[test]
fn programs_that_wait_are_woken() {
    let mut host = Host::asleep(&[[1, 1]]);
    host.pairs[0][1].view.header().waiters[0].mask.store(1, Ordering::Relaxed);
    host.pairs[0][1].view.slab().bells[0][0].announce();
    host.pairs[0][0].write(b"wake up");
    host.hear_bells();
    host.settle();
    let slab = host.pool.slab(host.pairs[0][1].id.slab).unwrap();
    assert_eq!(rustix::io::read(&slab.bells[0][0], &mut [0; 8]), Ok(8));
}

#[test]
fn an_ended_relay_touches_nothing_and_its_slabs_go_on() {
    // Both pairs in the same two slabs.
    let mut host = Host::asleep(&[[1, 1], [1, 1]]);
    for guest in &mut host.pairs[0] {
        guest.write(b"too late");
    }
    host.hear_bells();
    let carried = |tx_bytes, rx_bytes| Traffic { tx_bytes, tx_segments: 1, rx_bytes, rx_segments: 1 };
    assert_eq!(host.relays.remove(0), Some([(0, carried(1, 1)), (1, carried(1, 1))]));
    assert_eq!(host.relays.remove(0), None);
    let rings = |host: &Host| host.pairs[0].each_ref().map(|guest| guest.image(&host.pool));
    host.settle();
    host.sleep();
    let before = rings(&host);
    host.pairs[0].iter().for_each(|guest| host.relays.bell(guest.id.slab));
    host.settle();
    host.sleep();
    assert!(before == rings(&host));
    assert_eq!(host.pairs[0].each_mut().map(Guest::read), [b"", b""]);
    host.pairs[1][0].write(b"unharmed");
    assert!(host.hear_bells());
    host.settle();
    assert_eq!(host.pairs[1][1].read(), b"unharmed");
    let sum = host.relays.traffic().fold(0, |sum, (_, traffic)| sum + traffic.rx_bytes);
    assert_eq!(sum, 8 + 2);
    host.relays.remove(1);
    assert!(host.relays.is_idle() && host.warm() == 0);
    host.relays.bell(host.pairs[1][0].id.slab);
    assert!(!host.relays.pass(&mut host.drops));
}

#[test]
fn a_bad_index_is_told_once_and_harms_nobody_else() {
    let mut host = Host::asleep(&[[1, 1], [1, 2]]);
    host.pairs[0][0].ring(0).indices.head.head.store(u64::MAX / 2, Ordering::Release);
    host.pairs[0][0].bell();
    host.pairs[1][0].write(b"fine");
    host.hear_bells();
    assert!(host.relays.pass(&mut host.drops));
    assert!(!host.relays.rest(&mut host.drops), "it is still to be told");
    assert_eq!((host.relays.failed(), host.relays.failed()), (vec![0], vec![]));
    host.settle();
    assert_eq!(host.pairs[1][1].read(), b"fine");
    host.sleep();
    assert_eq!(host.drops.of("ring-index"), 1);
    assert!(host.relays.remove(0).is_some());
}
