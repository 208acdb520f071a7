//! What each stage of the fabric lane costs by itself, without the fabric, in one thread: the inputs of
//! `examples/model.rs` that are ours. `cargo bench -p vsocket-backend --bench stages`
//!
//! | name | what is in it, per message of 64 B or segment of 32 KiB |
//! |---|---|
//! | `put`, `get` | the guest's half: space or length checked, bytes copied, index published or released |
//! | `put and pump` | the same, and the sending backend: ring looked at, header written, both handed to a `Transmit` |
//! | `hear` | the receiving backend: header read and checked, flow found, segment handled, doorbell looked at |
//! | `look` | a pass over a flow that has nothing to do |
//! | `clock`, `sched_yield` | what a turn of the daemon's loop costs besides, the second only if it found nothing |
//! | `bell` | writing an eventfd that nobody waits for |
//!
//! And what the model's validation needs: `soft`, both ends of the soft fabric in one thread, so without any wake-up; and
//! what this machine takes from one thread to another: by a cache line and by an eventfd on two processors, by
//! `sched_yield` and by an eventfd on one.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::{CpuSet, sched_setaffinity, sched_yield};
use vsocket_backend::config::Mac;
use vsocket_backend::fabric::soft::{Options, Soft};
use vsocket_backend::fabric::{
    Access, Event, Fabric, LocalRange, MemoryKey, QpId, Region, RemoteAddress, Signal, WorkId,
};
use vsocket_backend::flow::{Flow, FlowKey, Identity, SEGMENT, Transmit, key_of};
use vsocket_backend::slab::{Pool, Segments, SlabKey, View};
use vsocket_channel::lane::Stay;
use vsocket_channel::message::Tuple;
use vsocket_channel::ring::Ring;
use vsocket_vxlan::{PayloadAt, Vni, decapsulate};

const RING: usize = 256 << 10;
const SMALL: usize = 64;
/// Small messages that are sent before the far side takes them: half a ring.
const BATCH: usize = RING / SMALL / 2;

/// Keeps messages one behind the other. A WRITE is only counted: it is the device that would move the bytes.
#[derive(Default)]
struct Post {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    writes: usize,
}

impl Transmit for Post {
    fn send(&mut self, header: &[u8], payload: &[u8]) -> bool {
        self.bytes.extend_from_slice(header);
        self.bytes.extend_from_slice(payload);
        self.ends.push(self.bytes.len());
        true
    }

    fn write(&mut self, _: usize, _: u64, _: usize) -> bool {
        self.writes += 1;
        true
    }

    fn ring(&mut self, _: usize) {}
}

/// A guest's ring ends, as its program would use them, and the flow over them.
struct End {
    view: View,
    flow: Flow,
    head: u64,
    tail: u64,
    post: Post,
}

struct Lane {
    _pool: Pool,
    near: End,
    far: End,
    by_key: HashMap<FlowKey, usize>,
}

impl End {
    fn new(pool: &mut Pool, program: u64, local: &str, remote: &str) -> Self {
        let id = pool.take(SlabKey::Fabric((0, program), 0), RING as u64).segment().expect("memory");
        let view = pool.view(id).expect("just taken");
        let stay = Stay { generation: 1, start: 1, escape: 7 };
        assert!(view.header().directions[0].publish_stay(stay));
        // The program waits at one doorbell, and is awake.
        view.header().waiters[0].mask.store(1, Ordering::Relaxed);
        let identity = Identity {
            vni: Vni::new(100).expect("24 bits"),
            macs: [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])],
            tuple: Tuple::new(local.parse().expect("an address"), remote.parse().expect("an address")),
            generation: 1,
        };
        let mut flow = Flow::new(identity, view.clone());
        flow.ready(RING as u64);
        Self { view, flow, head: 1, tail: 1, post: Post::default() }
    }

    fn put(&mut self, bytes: &[u8]) {
        let ring = Ring { indices: &self.view.header().directions[0], bytes: &self.view.rings[0] };
        assert!(ring.space(self.head).is_ok_and(|n| n >= bytes.len()));
        ring.bytes.put(self.head, bytes);
        self.head += bytes.len() as u64;
        ring.publish(self.head);
        vsocket_channel::bell::publish_fence();
    }

    fn get(&mut self, into: &mut [u8]) {
        let ring = Ring { indices: &self.view.header().directions[1], bytes: &self.view.rings[1] };
        assert!(ring.available(self.tail).is_ok_and(|n| n >= into.len()));
        ring.bytes.get(self.tail, into);
        self.tail += into.len() as u64;
        ring.release(self.tail);
        vsocket_channel::bell::publish_fence();
    }

    fn ready(&self) -> usize {
        let ring = Ring { indices: &self.view.header().directions[1], bytes: &self.view.rings[1] };
        ring.available(self.tail).expect("our own")
    }

    fn pump(&mut self, resting: bool) {
        self.flow.pump(&mut self.post, resting).expect("a guest that keeps to the rules");
    }
}

impl Lane {
    fn new() -> Self {
        let mut pool = Pool::default();
        let near = End::new(&mut pool, 1, "198.51.100.1:4000", "198.51.100.3:6379");
        let far = End::new(&mut pool, 2, "198.51.100.3:6379", "198.51.100.1:4000");
        let by_key = HashMap::from([(near.flow.key(), 0), (far.flow.key(), 1)]);
        let mut lane = Self { _pool: pool, near, far, by_key };
        // The stays are opened and confirmed both ways.
        for _ in 0..3 {
            lane.near.pump(true);
            lane.far.pump(true);
            lane.hear();
            lane.hear_back();
        }
        lane
    }

    /// The far side takes what was sent. What the daemon does with a message, less the fabric.
    fn hear(&mut self) {
        take(&mut self.near.post, &mut self.far.flow, &self.by_key);
    }

    fn hear_back(&mut self) {
        take(&mut self.far.post, &mut self.near.flow, &self.by_key);
    }

    /// Everything is sent, taken, read and acknowledged.
    fn settle(&mut self) {
        let mut into = [0; SMALL];
        loop {
            self.near.pump(false);
            self.hear();
            for _ in 0..self.far.ready() / SMALL {
                self.far.get(&mut into);
            }
            self.far.pump(true);
            self.hear_back();
            if self.far.tail == self.near.head {
                break;
            }
        }
    }
}

fn take(post: &mut Post, flow: &mut Flow, by_key: &HashMap<FlowKey, usize>) {
    let mut from = 0;
    for end in post.ends.drain(..) {
        let message = &post.bytes[from..end];
        let (segment, header, len, ahead) = match decapsulate(message, PayloadAt::Inline) {
            Ok((segment, header, len)) => (segment, header, len, false),
            Err(_) => {
                let (segment, header, len) = decapsulate(message, PayloadAt::Elsewhere).expect("our own");
                (segment, header, len, true)
            }
        };
        black_box(by_key.get(&key_of(&segment)).expect("a known flow"));
        flow.handle(&segment, (!ahead).then(|| &message[header..]), len).expect("our own");
        from = end;
    }
    post.bytes.clear();
}

/// Times what `timed` does with so many messages, `iters` of them in all, in batches that fit half a ring. Between two
/// batches, untimed, everything that was put is sent, taken, read and acknowledged.
fn batches(lane: &mut Lane, iters: u64, batch: usize, mut timed: impl FnMut(&mut Lane, usize)) -> Duration {
    let (mut left, mut took) = (iters, Duration::ZERO);
    while left > 0 {
        let n = left.min(batch as u64) as usize;
        let begin = Instant::now();
        timed(lane, n);
        took += begin.elapsed();
        lane.settle();
        left -= n as u64;
    }
    took
}

/// As `batches`, with something untimed before each.
fn prepared(
    lane: &mut Lane,
    iters: u64,
    batch: usize,
    mut before: impl FnMut(&mut Lane, usize),
    mut timed: impl FnMut(&mut Lane, usize),
) -> Duration {
    let (mut left, mut took) = (iters, Duration::ZERO);
    while left > 0 {
        let n = left.min(batch as u64) as usize;
        before(lane, n);
        took += batches(lane, n as u64, n, &mut timed);
        left -= n as u64;
    }
    took
}

fn put(lane: &mut Lane, n: usize, data: &[u8]) {
    (0..n).for_each(|_| lane.near.put(black_box(data)));
}

fn put_and_pump(lane: &mut Lane, n: usize, data: &[u8]) {
    for _ in 0..n {
        lane.near.put(black_box(data));
        lane.near.pump(false);
    }
}

fn small(c: &mut Criterion) {
    let mut group = c.benchmark_group("64 B");
    let mut lane = Lane::new();
    let (data, mut out) = ([7; SMALL], [0; SMALL]);
    group.bench_function("put", |b| {
        b.iter_custom(|iters| batches(&mut lane, iters, BATCH, |lane, n| put(lane, n, &data)));
    });
    group.bench_function("put and pump", |b| {
        b.iter_custom(|iters| batches(&mut lane, iters, BATCH, |lane, n| put_and_pump(lane, n, &data)));
    });
    group.bench_function("hear", |b| {
        b.iter_custom(|iters| {
            let before = |lane: &mut Lane, n| put_and_pump(lane, n, &data);
            prepared(&mut lane, iters, BATCH, before, |lane, _| lane.hear())
        });
    });
    group.bench_function("get", |b| {
        b.iter_custom(|iters| {
            let before = |lane: &mut Lane, n| {
                put_and_pump(lane, n, &data);
                lane.hear();
            };
            prepared(&mut lane, iters, BATCH, before, |lane, n| (0..n).for_each(|_| lane.far.get(&mut out)))
        });
    });
    group.finish();
}

/// Segments whose payload goes ahead: the bytes are moved by the guest's two copies and the device, not by a backend.
fn large(c: &mut Criterion) {
    let mut group = c.benchmark_group("32 KiB");
    let mut lane = Lane::new();
    let (data, mut out) = (vec![7; SEGMENT], vec![0; SEGMENT]);
    let batch = RING / SEGMENT / 2;
    group.bench_function("put", |b| {
        b.iter_custom(|iters| batches(&mut lane, iters, batch, |lane, n| put(lane, n, &data)));
    });
    group.bench_function("pump", |b| {
        b.iter_custom(|iters| {
            let before = |lane: &mut Lane, n| put(lane, n, &data);
            prepared(&mut lane, iters, batch, before, |lane, _| lane.near.pump(false))
        });
    });
    group.bench_function("hear", |b| {
        b.iter_custom(|iters| {
            let before = |lane: &mut Lane, n| {
                put(lane, n, &data);
                lane.near.pump(false);
            };
            prepared(&mut lane, iters, batch, before, |lane, _| lane.hear())
        });
    });
    group.bench_function("get", |b| {
        b.iter_custom(|iters| {
            let before = |lane: &mut Lane, n| {
                put(lane, n, &data);
                lane.near.pump(false);
                lane.hear();
            };
            prepared(&mut lane, iters, batch, before, |lane, n| (0..n).for_each(|_| lane.far.get(&mut out)))
        });
    });
    group.finish();
}

fn turn(c: &mut Criterion) {
    let mut group = c.benchmark_group("turn");
    let mut lane = Lane::new();
    group.bench_function("look", |b| b.iter(|| lane.near.pump(false)));
    group.bench_function("clock", |b| b.iter(|| black_box(Instant::now())));
    group.bench_function("sched_yield", |b| b.iter(sched_yield));
    let bell = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    group.bench_function("bell", |b| b.iter(|| rustix::io::write(&bell, &1u64.to_ne_bytes())));
    group.finish();
}

/// Two ends of the soft fabric, and a region of the far one.
fn soft_pair() -> (Soft, QpId, MemoryKey, Soft, MemoryKey) {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let new = || Soft::new(any, Options::default()).expect("a port");
    let (mut a, mut b) = (new(), new());
    let (near, far) = (a.open_domain(), b.open_domain());
    let local = a.register(near, Region::private(SEGMENT), Access::Local).expect("a region");
    let remote = b.register(far, Region::private(SEGMENT), Access::RemoteWrite).expect("a region");
    let (_, offer) = b.expect(far, 100, [9; 32], Instant::now()).expect("a secret");
    let (qp, _) = a.dial(near, 100, [9; 32], &offer, Instant::now()).expect("dialling");
    let mut up = 0;
    while up < 2 {
        for end in [&mut a, &mut b] {
            up += usize::from(matches!(end.poll(), Some(Event::Connected { .. })));
        }
    }
    (a, qp, local, b, remote)
}

/// The sender's half (post, flush) or the receiver's (poll until the message is there) of one message over loopback TCP;
/// with the header of a segment of 32 KiB that is written ahead, or with 64 B in it.
fn soft(c: &mut Criterion) {
    let mut group = c.benchmark_group("soft");
    let (mut a, qp, local, mut b, remote) = soft_pair();
    for (name, ahead, senders) in [
        ("64 B, post and flush", false, true),
        ("64 B, poll", false, false),
        ("32 KiB, post and flush", true, true),
        ("32 KiB, poll", true, false),
    ] {
        let mut one = |_| {
            let begin = Instant::now();
            if ahead {
                let from = LocalRange { lkey: local.lkey, offset: 0, len: SEGMENT };
                let to = RemoteAddress { rkey: remote.rkey, address: remote.base };
                a.post_write(qp, WorkId(0), from, to, Signal::No).expect("room");
            }
            a.post_send(qp, WorkId(0), &[&[1; 74], &[2; 64][..if ahead { 0 } else { 64 }]], Signal::No)
                .expect("room");
            a.flush();
            let sent = begin.elapsed();
            // What did not fit the socket leaves with the sender's next poll.
            let mut polled = Duration::ZERO;
            loop {
                let begin = Instant::now();
                let there = matches!(b.poll(), Some(Event::Received { .. }));
                polled += begin.elapsed();
                if there {
                    break;
                }
                assert!(a.poll().is_none());
            }
            if senders { sent } else { polled }
        };
        group.bench_function(name, |b| b.iter_custom(|iters| (0..iters).map(&mut one).sum()));
    }
    // A pass that finds nothing.
    group.bench_function("empty poll", |b| b.iter(|| assert!(a.poll().is_none())));
    group.finish();
}

/// One way from one thread to another that waits.
fn machine(c: &mut Criterion) {
    let mut group = c.benchmark_group("machine");
    group.bench_function("cache line", |b| b.iter_custom(|iters| hops(iters, 1, Wait::Spin)));
    group.bench_function("switch by sched_yield", |b| b.iter_custom(|iters| hops(iters, 0, Wait::Yield)));
    group.bench_function("wake by eventfd", |b| b.iter_custom(|iters| hops(iters, 1, Wait::Block)));
    group.bench_function("wake on one processor", |b| b.iter_custom(|iters| hops(iters, 0, Wait::Block)));
    group.finish();
}

#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Spin,
    Yield,
    Block,
}

/// So many hops between a thread on processor 0 and one on `other`.
fn hops(iters: u64, other: usize, wait: Wait) -> Duration {
    let pin = |cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).expect("a processor");
    };
    let bells = [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
    let turn = AtomicU64::new(0);
    let play = |me: u64| {
        let begin = Instant::now();
        for round in 0..iters.div_ceil(2) {
            while wait != Wait::Block && turn.load(Ordering::Acquire) != 2 * round + me {
                if wait == Wait::Yield { sched_yield() } else { std::hint::spin_loop() }
            }
            if wait == Wait::Block && (me == 1 || round > 0) {
                rustix::io::read(&bells[me as usize], &mut [0; 8]).expect("a ring");
            }
            turn.store(2 * round + me + 1, Ordering::Release);
            if wait == Wait::Block {
                rustix::io::write(&bells[1 - me as usize], &1u64.to_ne_bytes()).expect("room");
            }
        }
        begin.elapsed()
    };
    std::thread::scope(|s| {
        let far = s.spawn(|| {
            pin(other);
            play(1)
        });
        s.spawn(|| {
            pin(0);
            play(0)
        });
        far.join().expect("no panic")
    })
}

criterion_group!(benches, small, large, turn, soft, machine);
criterion_main!(benches);
