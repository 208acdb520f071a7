use std::sync::atomic::Ordering;

use vsocket_channel::Side as Direction;
use vsocket_channel::bell::publish_fence;
use vsocket_channel::lane::Stay;
use vsocket_channel::message::Tuple;
use vsocket_channel::ring::Ring;
use vsocket_vxlan::Vni;

use super::*;
use crate::config::Mac;
use crate::fabric::fault::{Faulty, Plan};
use crate::fabric::loopback::{self, Loopback};
use crate::fabric::{Fabric, new_secret};
use crate::flow::Identity;
use crate::slab::{Pool, SegmentId, Segments, SlabKey, View};

const RING: usize = 1 << 14;
const LATER: std::time::Duration = std::time::Duration::from_secs(1);

/// A guest's end of a connection.
struct Guest {
    id: SegmentId,
    view: View,
    head: u64,
    tail: u64,
    /// It has written to the bell.
    rang: bool,
}

impl Guest {
    fn ring(&self, from: usize) -> Ring<'_> {
        Ring { indices: &self.view.header().directions[from], bytes: &self.view.rings[from] }
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
            assert!(self.view.header().directions[0].publish_stay(stay));
        }
        let ring = self.ring(0);
        assert!(ring.space(self.head).unwrap() >= bytes.len());
        ring.bytes.put(self.head, bytes);
        let head = self.head + bytes.len() as u64;
        ring.publish(head);
        self.head = head;
        self.bell();
    }

    fn read(&mut self) -> Vec<u8> {
        if self.tail == 0 {
            let Some(stay) = self.view.header().directions[1].stay(3) else { return vec![] };
            self.tail = stay.start;
        }
        let ring = self.ring(1);
        let mut got = vec![0; ring.available(self.tail).unwrap()];
        ring.bytes.get(self.tail, &mut got);
        ring.release(self.tail + got.len() as u64);
        self.tail += got.len() as u64;
        publish_fence();
        let want = &self.view.header().directions[1].stay.want_space;
        if want.swap(0, Ordering::AcqRel) != 0 {
            self.bell();
        }
        got
    }
}

/// A backend with the guests' ends of its flows, whose numbers are 1, 2, …
struct Host {
    data: Data,
    drops: Named,
    pool: Pool,
    pair: Pair,
    guests: Vec<Guest>,
}

impl Host {
    fn pass(&mut self) -> bool {
        self.data.pass(&mut self.drops, false)
    }

    /// The daemon's sleep and what wakes it: true if a bell has.
    fn sleep(&mut self) -> bool {
        assert!(self.data.rest(&mut self.drops));
        self.hear_bells()
    }

    fn hear_bells(&mut self) -> bool {
        let mut rung = false;
        for guest in &mut self.guests {
            if std::mem::take(&mut guest.rang) {
                rung = true;
                self.data.bell(guest.id.slab);
            }
        }
        rung
    }

    fn is_cold(&self) -> bool {
        self.data.shelves.nth_warm(0).is_none()
    }

    fn add(&mut self, n: usize) -> RegionRef {
        // A slab each.
        let id = self.pool.take(SlabKey::Fabric((0, n as u64), 0), RING as u64).segment().unwrap();
        let (view, slab) = (self.pool.view(id).unwrap(), self.pool.slab(id.slab).unwrap());
        let key = self.data.key(id.slab, slab, self.pair.domain).unwrap();
        let rx = key.base + view.ring_offset(Direction::One) as u64;
        let flow = Flow::new(identity(self.pair.peer as usize, n), view.clone());
        self.data.add(n as u64, 0, self.pair, key, flow, (id.slab, slab));
        self.guests.push(Guest { id, view, head: 0, tail: 0, rang: false });
        RegionRef { stag: key.rkey, base: rx, len: RING as u64 }
    }
}

fn identity(peer: usize, n: usize) -> Identity {
    let near = format!("198.51.100.1:{}", 4000 + n).parse().unwrap();
    let far = "198.51.100.3:80".parse().unwrap();
    let tuple = if peer == 1 { Tuple::new(near, far) } else { Tuple::new(far, near) };
    let macs = [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])];
    Identity { vni: Vni::new(100).unwrap(), macs, tuple, generation: 3 }
}

/// Two hosts with `flows` connections between them, each in a slab of its own; the first has the fabric that `wrap` makes.
fn hosts_with(flows: usize, wrap: impl Fn(Loopback) -> Box<dyn Fabric>) -> [Host; 2] {
    let (a, b) = loopback::pair().unwrap();
    let mut fabrics: [Box<dyn Fabric>; 2] = [wrap(a), Box::new(b)];
    let (secret, now) = (new_secret().unwrap(), Instant::now());
    let domains = [fabrics[0].open_domain(), fabrics[1].open_domain()];
    let (listener, offer) = fabrics[0].expect(domains[0], 100, secret, now).unwrap();
    let (dialler, answer) = fabrics[1].dial(domains[1], 100, secret, &offer, now).unwrap();
    fabrics[0].accept(listener, &answer).unwrap();
    let mut sides = [1, 0].into_iter().zip([listener, dialler]).zip(domains);
    let mut hosts = fabrics.map(|fabric| {
        let ((peer, qp), domain) = sides.next().unwrap();
        let pair = Pair { qp, domain, vni: 100, peer, offer: 1, up: true };
        let mut data = Data::new(fabric);
        data.pairs.push(pair);
        Host { data, drops: Named::default(), pool: Pool::default(), pair, guests: vec![] }
    });
    hosts.iter_mut().for_each(|host| {
        while host.pass() {
            host.data.notices.clear();
        }
    });
    for n in 1..=flows {
        let rx = [hosts[0].add(n), hosts[1].add(n)];
        hosts[0].data.ready(n as u64, rx[1]);
        hosts[1].data.ready(n as u64, rx[0]);
    }
    hosts
}

fn hosts(flows: usize) -> [Host; 2] {
    hosts_with(flows, |fabric| Box::new(fabric))
}

/// Hosts whose guests have exchanged a byte each way, and which sleep.
fn asleep(flows: usize) -> [Host; 2] {
    let mut hosts = hosts(flows);
    for n in 0..flows {
        for host in &mut hosts {
            host.guests[n].write(b"0");
        }
    }
    settle(&mut hosts);
    for n in 0..flows {
        assert_eq!((hosts[0].guests[n].read(), hosts[1].guests[n].read()), (b"0".to_vec(), b"0".to_vec()));
    }
    sleep(&mut hosts);
    hosts
}

/// Until nothing moves.
fn settle(hosts: &mut [Host; 2]) {
    while hosts[0].pass() | hosts[1].pass() {}
}

/// Until both sleep, and are woken by their fabrics only.
fn sleep(hosts: &mut [Host; 2]) {
    loop {
        let idle = hosts.each_mut().map(|host| host.data.rest(&mut host.drops));
        let rung = hosts.each_mut().map(Host::hear_bells);
        if idle == [true; 2] && rung == [false; 2] {
            break;
        }
        settle(hosts);
    }
    assert!(hosts.iter().all(Host::is_cold));
}

#[test]
fn a_cold_slab_is_not_looked_at_until_its_bell_rings() {
    let mut hosts = asleep(2);
    hosts[0].guests[0].write(b"first");
    settle(&mut hosts);
    assert_eq!(hosts[1].guests[0].read(), b"", "the slab was visited though nobody has heard its bell");
    assert!(hosts[0].hear_bells());
    settle(&mut hosts);
    assert_eq!(hosts[1].guests[0].read(), b"first");
    // The other slab has stayed cold on both sides.
    assert!(hosts.iter().all(|host| host.data.shelves.nth_warm(1).is_none()));
}

/// While a slab is warm its guest need not ring.
#[test]
fn a_warm_slab_takes_its_announcement_back() {
    let mut hosts = asleep(1);
    hosts[0].guests[0].write(b"1");
    assert!(hosts[0].hear_bells());
    settle(&mut hosts);
    hosts[0].guests[0].write(b"2");
    hosts[1].guests[0].write(b"3");
    assert!(!hosts[0].hear_bells() && !hosts[1].hear_bells());
    settle(&mut hosts);
    assert_eq!(hosts[1].guests[0].read(), b"12");
    assert_eq!(hosts[0].guests[0].read(), b"3");
}

/// Dekker's case: who publishes just before the announcement does not ring, so the look after it must find the bytes.
#[test]
fn what_was_published_before_the_announcement_is_found_by_the_look() {
    let mut hosts = asleep(1);
    hosts[0].guests[0].write(b"1");
    assert!(hosts[0].hear_bells());
    settle(&mut hosts);
    for idle in [false, true] {
        hosts[0].guests[0].write(b"2");
        let host = &mut hosts[0];
        if idle {
            assert!(!host.data.rest(&mut host.drops), "slept upon bytes");
        } else {
            host.data.cool(Instant::now(), &mut host.drops);
            host.data.cool(Instant::now() + LATER, &mut host.drops);
        }
        assert!(!host.is_cold() && !host.hear_bells());
        settle(&mut hosts);
    }
    assert_eq!(hosts[1].guests[0].read(), b"122");
}

/// Who publishes after the announcement rings, however the slab turned cold.
#[test]
fn a_slab_that_cools_while_others_work_hears_its_bell() {
    let mut hosts = asleep(1);
    for n in 0..3 {
        hosts[0].guests[0].write(&[n]);
        assert!(hosts[0].hear_bells(), "round {n}");
        settle(&mut hosts);
        for host in &mut hosts {
            host.data.cool(Instant::now(), &mut host.drops);
            assert!(!host.is_cold(), "it has worked just now");
            host.data.cool(Instant::now() + LATER, &mut host.drops);
        }
        // The acknowledgement, which had waited for the look.
        settle(&mut hosts);
        hosts.iter_mut().for_each(|host| {
            host.data.cool(Instant::now() + LATER, &mut host.drops);
            host.data.cool(Instant::now() + LATER * 2, &mut host.drops);
        });
        assert!(hosts.iter().all(Host::is_cold));
        assert_eq!(hosts[1].guests[0].read(), [n]);
    }
}

#[test]
fn a_segment_for_a_cold_slab_is_delivered_and_answered() {
    let mut hosts = asleep(1);
    // Its program waits at a bell.
    hosts[1].guests[0].view.header().waiters[0].mask.store(1, Ordering::Relaxed);
    hosts[1].guests[0].view.slab().bells[0][0].announce();
    hosts[0].guests[0].write(b"far");
    assert!(hosts[0].hear_bells() && hosts[1].is_cold());
    hosts[0].pass();
    assert!(hosts[1].pass());
    assert_eq!(hosts[1].guests[0].read(), b"far");
    assert!(!hosts[1].guests[0].view.slab().bells[0][0].take(), "the program was not woken");
    hosts[1].guests[0].write(b"back");
    assert!(!hosts[1].hear_bells());
    settle(&mut hosts);
    assert_eq!(hosts[0].guests[0].read(), b"back");
}

/// Who waits for an acknowledgement stays warm, as only such are watched for a peer that does not answer; and what is
/// owed is sent before the slab turns cold.
#[test]
fn acknowledgements_are_sent_before_a_slab_turns_cold_and_waited_for_warm() {
    let mut hosts = asleep(1);
    hosts[0].guests[0].write(b"1");
    hosts[0].hear_bells();
    while hosts[0].pass() {}
    assert!(hosts[0].sleep() | !hosts[0].is_cold());
    assert!(hosts[0].data.waits_for(1));
    // It is taken, and nothing goes the other way.
    while hosts[1].pass() {}
    while hosts[0].pass() {}
    assert!(hosts[0].data.waits_for(1));
    hosts[1].data.cool(Instant::now(), &mut hosts[1].drops);
    hosts[1].data.cool(Instant::now() + LATER, &mut hosts[1].drops);
    settle(&mut hosts);
    assert!(!hosts[0].data.waits_for(1));
    sleep(&mut hosts);
}

/// A reader makes room in a slab that is cold: the sender, which waits for it, hears of it.
#[test]
fn room_made_in_a_cold_slab_is_told() {
    const MUCH: usize = RING / 4 * 3;
    let mut hosts = asleep(1);
    hosts[0].guests[0].write(&[1; MUCH]);
    hosts[0].hear_bells();
    settle(&mut hosts);
    sleep(&mut hosts);
    // The far ring is nearly full, so some of these wait, in slabs that are cold.
    hosts[0].guests[0].write(&[2; MUCH]);
    hosts[0].hear_bells();
    settle(&mut hosts);
    sleep(&mut hosts);
    let mut got = hosts[1].guests[0].read();
    assert!(got.len() < 2 * MUCH);
    assert!(hosts[1].hear_bells(), "nobody was asked to tell of the room");
    settle(&mut hosts);
    got.extend(hosts[1].guests[0].read());
    assert_eq!(got, [[1; MUCH], [2; MUCH]].concat());
}

/// A fabric without room: no bell will tell that there is again, so the flow stays in sight.
#[test]
fn what_the_fabric_refused_is_sent_when_there_is_room() {
    let full = Plan { full: 900, ..Plan::default() };
    let mut hosts = hosts_with(1, |fabric| Box::new(Faulty::new(fabric, full, 7)));
    for n in 0..50u8 {
        hosts[0].guests[0].write(&[n; 100]);
        hosts[0].hear_bells();
        let mut got = vec![];
        while got.len() < 100 {
            let host = &mut hosts[0];
            if host.data.rest(&mut host.drops) {
                // Asleep, and only the fabric wakes it.
                assert!(!host.hear_bells());
            }
            host.pass();
            hosts[1].pass();
            got.extend(hosts[1].guests[0].read());
        }
        assert_eq!(got, [n; 100]);
    }
}

#[test]
fn a_stop_is_told_from_a_cold_slab() {
    for dropped in [false, true] {
        let mut hosts = asleep(1);
        hosts[0].data.stop(1);
        if dropped {
            assert_eq!(hosts[0].data.remove(1).map(|(vport, _)| vport), Some(0));
        }
        assert!(hosts[0].pass());
        hosts[1].pass();
        let told = hosts[1].data.notices.iter().any(|n| matches!(n, Notice::Quiet { flow: 1 }));
        assert!(told, "the peer was not told");
        assert_eq!(hosts[0].data.is_idle(), dropped);
    }
}

/// The last word is refused: it is said later, though the flow is forgotten and its slab has nothing else.
#[test]
fn a_last_word_that_was_refused_is_said_later() {
    let full = Plan { full: 900, ..Plan::default() };
    let mut hosts = hosts_with(1, |fabric| Box::new(Faulty::new(fabric, full, 3)));
    hosts[0].data.stop(1);
    hosts[0].data.remove(1);
    let mut told = false;
    for _ in 0..10_000 {
        let host = &mut hosts[0];
        host.data.rest(&mut host.drops);
        host.pass();
        hosts[1].pass();
        told |= hosts[1].data.notices.iter().any(|n| matches!(n, Notice::Quiet { flow: 1 }));
        if told {
            break;
        }
    }
    assert!(told && hosts[0].data.is_idle());
}

/// What the guest had published before its peer was ready is sent when it is.
#[test]
fn a_peer_that_becomes_ready_warms_the_slab() {
    let [mut a, mut b] = hosts(0);
    let (_, there) = (a.add(1), b.add(1));
    a.guests[0].write(b"early");
    a.pass();
    assert!(!a.sleep());
    a.data.ready(1, there);
    a.pass();
    b.pass();
    assert_eq!(b.guests[0].read(), b"early");
}

#[test]
fn a_slab_is_forgotten_with_its_last_flow() {
    let mut hosts = asleep(3);
    for n in [2, 1, 3] {
        hosts[0].data.remove(n);
        hosts[0].data.bell(hosts[0].guests[n as usize - 1].id.slab);
        assert!(hosts[0].is_cold());
    }
    assert!(hosts[0].data.is_idle());
    hosts[1].guests[0].write(b"stray");
    hosts[1].hear_bells();
    settle(&mut hosts);
    assert!(hosts[0].is_cold());
}
