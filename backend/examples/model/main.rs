//! What the fabric lane would do on a 100 Gb/s RNIC: a simulation, on a virtual clock, around the product's own flows.
//!
//! `cargo run --release -p vsocket-backend --example model` prints the tables of `docs/performance.md`; the tests hold
//! the document to them. Rings, segments, windows and acknowledgements are the product's ([`Flow`] does them). What a step
//! takes is a constant with its source ([`costs`]). The bytes of a stream are counted, not moved.
//!
//! Programs and backends are threads that do one thing after the other, each on a processor of its own unless the machine
//! has too few. A backend's turn is the daemon's: take what has arrived, pump each flow, hand all of it to the fabric at
//! once. The wire is one queue per direction, with a latency. Not here: loss, congestion, a switch, other tenants, memory
//! bandwidth, and the moods of a scheduler.

#![forbid(unsafe_code)]

mod costs;
mod report;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use costs::{COUNT, Costs, Stage};
use vsocket_backend::config::Mac;
use vsocket_backend::flow::{Flow, Identity, Transmit};
use vsocket_backend::slab::{Pool, Segments, SlabKey, View};
use vsocket_channel::lane::Stay;
use vsocket_channel::message::Tuple;
use vsocket_channel::ring::Ring;
use vsocket_vxlan::{PayloadAt, Vni, decapsulate};

/// Bytes of a ring, by the daemon's default.
const RING: usize = 256 << 10;
/// How long, in ns, a backend polls after its last work, and a program that spins.
const SPIN: f64 = 50_000.0;
/// The most that one `recv` takes.
const READ: usize = 128 << 10;
/// Bytes of a request and of its answer.
const MESSAGE: usize = 64;
/// What is sent inline with the work request, so that the device need not fetch it.
const INLINE: usize = 188;
/// Every so many turns a backend leaves nothing unacknowledged.
const REST: u64 = 64;

/// What the programs do. Program 0 asks or sends, program 1 answers or receives.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// So many connections, each with one request under way and a pause, in ns, before the next.
    Ask { connections: usize, pause: f64 },
    /// One connection, written to without end.
    Stream { write: usize },
}

/// Where and how it runs.
#[derive(Clone, Copy, Debug)]
struct Setting {
    costs: Costs,
    /// Thread `n` (program 0, program 1, backend 0, backend 1) runs on processor `n % processors`.
    processors: usize,
    /// Whether programs spin before they sleep.
    spinning: bool,
    /// Bytes of a ring.
    ring: usize,
}

/// What was seen, in ns where it is a time.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Outcome {
    /// Round trips a second.
    rate: f64,
    /// The mean round trip.
    trip: f64,
    /// Read by program 1.
    gbits: f64,
    /// Share of the time that the threads did something useful, and the wire from 0 to 1.
    busy: [f64; 5],
    /// Time spent in each stage, per round trip or per MiB.
    spent: Costs,
    /// The most bytes that were sent and not acknowledged.
    flight: usize,
}

#[derive(Debug)]
enum Event {
    /// Program, connection: there may be something to do. By its own clock, or because it was told.
    Look(usize, usize, bool),
    /// A program does the next thing.
    Begin(usize),
    /// Program, connection, tail, head: what it has read and written becomes visible.
    Show(usize, usize, u64, u64),
    /// A backend takes its next step.
    Step(usize),
    /// Backend, connection: a message arrives.
    Arrive(usize, usize, Vec<u8>),
}

struct Entry(f64, u64, Event);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    /// The earliest is the greatest, and of two the first that was told.
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0).then(other.1.cmp(&self.1))
    }
}

/// One end of a connection: its rings, its flow, and its program's own indices.
struct End {
    view: View,
    flow: Flow,
    head: u64,
    tail: u64,
    /// Payload handed to the fabric.
    sent: u64,
}

/// A program or a backend.
#[derive(Default)]
struct Thread {
    /// Program: connections to look at, and whether it is at it.
    due: VecDeque<usize>,
    running: bool,
    /// Backend: what has arrived; the flow to pump next; what leaves at the end of the turn.
    inbox: VecDeque<(usize, Vec<u8>)>,
    pumping: Option<usize>,
    outbox: Vec<(usize, Vec<u8>, Vec<usize>)>,
    turns: u64,
    worked: bool,
    /// Whether something was taken in this turn.
    heard: bool,
    asleep: bool,
    /// It goes on when the other thread of its processor lets it.
    deferred: bool,
    worked_at: f64,
}

/// What one pump gives: messages, each with the lengths of the WRITEs before it.
#[derive(Default)]
struct Sent(Vec<(Vec<u8>, Vec<usize>)>, Vec<usize>);

impl Transmit for Sent {
    fn send(&mut self, header: &[u8], payload: &[u8]) -> bool {
        self.0.push(([header, payload].concat(), std::mem::take(&mut self.1)));
        true
    }

    fn write(&mut self, _: usize, _: u64, len: usize) -> bool {
        self.1.push(len);
        true
    }

    fn ring(&mut self, _: usize) {}
}

impl End {
    fn new(pool: &mut Pool, ring: usize, side: usize, number: usize) -> Self {
        let id = pool.take(SlabKey::Fabric((side as u32, 1), 0), ring as u64).segment().expect("memory");
        let view = pool.view(id).expect("just taken");
        assert!(view.header().directions[0].publish_stay(Stay { generation: 1, start: 1, escape: 7 }));
        let ends = [([198, 51, 100, 1], 4000 + number as u16).into(), ([198, 51, 100, 3], 6379).into()];
        let identity = Identity {
            vni: Vni::new(100).expect("24 bits"),
            macs: [Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])],
            tuple: Tuple::new(ends[side], ends[1 - side]),
            generation: 1,
        };
        let mut flow = Flow::new(identity, view.clone());
        flow.ready(ring as u64);
        Self { view, flow, head: 1, tail: 1, sent: 0 }
    }

    fn ring(&self, from: usize) -> Ring<'_> {
        Ring { indices: &self.view.header().directions[from], bytes: &self.view.rings[from] }
    }

    fn space(&self) -> usize {
        self.ring(0).space(self.head).expect("our own")
    }

    fn ready(&self) -> usize {
        self.ring(1).available(self.tail).expect("our own")
    }

    fn pump(&mut self, resting: bool) -> Sent {
        let mut sent = Sent::default();
        self.flow.pump(&mut sent, resting).expect("our own");
        sent
    }

    /// Takes a message; how much payload it brought, and whether that went ahead.
    fn hear(&mut self, message: &[u8]) -> (usize, bool) {
        let inline = decapsulate(message, PayloadAt::Inline);
        let ahead = inline.is_err();
        let (segment, header, len) =
            inline.or_else(|_| decapsulate(message, PayloadAt::Elsewhere)).expect("our own");
        self.flow.handle(&segment, (!ahead).then(|| &message[header..]), len).expect("our own");
        (len, ahead)
    }
}

struct World {
    setting: Setting,
    work: Work,
    now: f64,
    told: u64,
    events: BinaryHeap<Entry>,
    ends: Vec<[End; 2]>,
    threads: [Thread; 4],
    /// Until when each processor is taken, and by whom it was last.
    processors: Vec<(f64, usize)>,
    /// Per direction: until when the wire is taken, and when the last message arrives.
    wire: [(f64, f64); 2],
    /// Per connection: when its request was made, if one is under way.
    asked: Vec<Option<f64>>,
    /// What is left of the write under way.
    left: usize,
    trips: (u64, f64),
    read: u64,
    busy: [f64; 5],
    spent: Costs,
    flight: usize,
    random: u64,
}

impl World {
    fn new(setting: Setting, work: Work, pool: &mut Pool) -> Self {
        let connections = if let Work::Ask { connections, .. } = work { connections } else { 1 };
        let mut ends: Vec<[End; 2]> =
            (0..connections).map(|n| [0, 1].map(|side| End::new(pool, setting.ring, side, n))).collect();
        // The stays are opened and confirmed before the clock starts.
        for pair in &mut ends {
            for side in [0, 1, 0, 1] {
                for (message, _) in pair[side].pump(true).0 {
                    pair[1 - side].hear(&message);
                }
            }
        }
        let mut world = Self {
            setting,
            work,
            now: 0.0,
            told: 0,
            events: BinaryHeap::new(),
            ends,
            threads: Default::default(),
            processors: (0..setting.processors).map(|n| (0.0, n)).collect(),
            wire: [(0.0, 0.0); 2],
            asked: vec![None; connections],
            left: 0,
            trips: (0, 0.0),
            read: 0,
            busy: [0.0; 5],
            spent: [0.0; COUNT],
            flight: 0,
            random: 1,
        };
        (0..connections).for_each(|conn| world.tell(0.0, Event::Look(0, conn, true)));
        (0..2).for_each(|side| world.tell(0.0, Event::Step(side)));
        world
    }

    fn tell(&mut self, at: f64, event: Event) {
        self.told += 1;
        self.events.push(Entry(at, self.told, event));
    }

    /// What a stage takes, so many times, accounted for.
    fn take(&mut self, stage: Stage, times: usize) -> f64 {
        let cost = self.setting.costs[stage as usize] * times as f64;
        self.spent[stage as usize] += cost;
        cost
    }

    /// Runs a thread for a while, when its processor is free; until when.
    fn run(&mut self, thread: usize, cost: f64, useful: bool) -> f64 {
        let at = thread % self.processors.len();
        let (free, last) = self.processors[at];
        let switch = if last == thread { 0.0 } else { self.take(Stage::Switch, 1) };
        let end = self.now.max(free) + switch + cost;
        self.processors[at] = (end, thread);
        if useful {
            self.busy[thread] += cost;
        }
        end
    }

    /// From 0 to 1, the same in every run (splitmix64).
    fn chance(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn run_until(&mut self, end: f64) {
        while self.events.peek().is_some_and(|entry| entry.0 < end) {
            let Some(Entry(at, _, event)) = self.events.pop() else { return };
            self.now = at;
            match event {
                Event::Look(program, conn, own) => self.look(program, conn, own),
                Event::Begin(program) => self.begin(program),
                Event::Show(program, conn, tail, head) => self.show(program, conn, tail, head),
                Event::Step(side) => self.step(side),
                Event::Arrive(side, conn, message) => {
                    self.threads[2 + side].inbox.push_back((conn, message));
                    self.rouse(side);
                }
            }
        }
    }

    fn sleeps(&self, program: usize) -> bool {
        let thread = &self.threads[program];
        !thread.running && (!self.setting.spinning || self.now > thread.worked_at + SPIN)
    }

    fn look(&mut self, program: usize, conn: usize, own: bool) {
        if !self.threads[program].due.contains(&conn) {
            self.threads[program].due.push_back(conn);
        }
        if !self.threads[program].running {
            let wake = if self.sleeps(program) && !own { self.take(Stage::WakeNear, 1) } else { 0.0 };
            self.threads[program].running = true;
            self.tell(self.now + wake, Event::Begin(program));
        }
    }

    /// Whether a backend is between the beginning and the end of a turn.
    fn is_in_turn(&self, side: usize) -> bool {
        let thread = &self.threads[2 + side];
        thread.worked || thread.heard || thread.pumping.is_some()
    }

    /// A program does what there is to do on the next connection that has something. Who shares a processor lets the other
    /// end what it is at: that is what a scheduler does, whose slices are longer.
    fn begin(&mut self, program: usize) {
        if self.setting.processors < 4 && self.is_in_turn(program) {
            self.threads[program].deferred = true;
            return;
        }
        while let Some(conn) = self.threads[program].due.pop_front() {
            let (ready, space) = (self.ends[conn][program].ready(), self.ends[conn][program].space());
            let (read, wrote) = match self.work {
                Work::Ask { pause, .. } => match (program, self.asked[conn]) {
                    (0, None) => (0, MESSAGE),
                    _ if ready < MESSAGE => continue,
                    (0, _) if pause > 0.0 => (MESSAGE, 0),
                    _ => (MESSAGE, MESSAGE),
                },
                Work::Stream { write } if program == 0 => {
                    // Who had to wait goes on when a quarter of the ring is free.
                    let blocked = self.asked[0].is_some();
                    if space == 0 || blocked && space < self.setting.ring / 4 {
                        self.asked[0] = Some(self.now);
                        continue;
                    }
                    self.asked[0] = None;
                    let n = space.min(if self.left == 0 { write } else { self.left });
                    self.left = if self.left == 0 { write - n } else { self.left - n };
                    (0, n)
                }
                Work::Stream { .. } if ready == 0 => continue,
                Work::Stream { .. } => (ready.min(READ), 0),
            };
            self.serve(program, conn, read, wrote);
            return;
        }
        self.threads[program].running = false;
        self.threads[program].worked_at = self.now;
        if std::mem::take(&mut self.threads[2 + program].deferred) {
            self.tell(self.now, Event::Step(program));
        }
    }

    fn serve(&mut self, program: usize, conn: usize, read: usize, wrote: usize) {
        let (mut cost, mut answer) = (0.0, 0.0);
        if read > 0 {
            cost += self.take(Stage::Recv, 1) + self.take(Stage::RecvByte, read);
            if let Work::Ask { .. } = self.work {
                cost += self.take(if program == 0 { Stage::Client } else { Stage::Server }, 1);
            }
        }
        if wrote > 0 {
            answer = self.take(Stage::Send, 1) + self.take(Stage::SendByte, wrote);
        }
        // A request that finds the backend asleep has to ring for it.
        if self.threads[2 + program].asleep {
            answer += self.take(Stage::Bell, 1);
        }
        let end = self.run(program, cost + answer, true);
        if let (Work::Ask { pause, .. }, 0) = (self.work, program) {
            let turned = end - answer;
            if read > 0
                && let Some(asked) = self.asked[conn].take()
            {
                self.trips = (self.trips.0 + 1, self.trips.1 + turned - asked);
            }
            if wrote > 0 {
                self.asked[conn] = Some(turned);
            } else {
                self.tell(end + pause, Event::Look(0, conn, true));
            }
        } else if let Work::Stream { .. } = self.work {
            self.read += read as u64;
            self.threads[program].due.push_back(conn);
        }
        let side = &mut self.ends[conn][program];
        (side.tail, side.head) = (side.tail + read as u64, side.head + wrote as u64);
        let (tail, head) = (side.tail, side.head);
        let seen = end + self.take(Stage::Transfer, 1);
        self.tell(seen, Event::Show(program, conn, tail, head));
        self.tell(end, Event::Begin(program));
    }

    fn show(&mut self, program: usize, conn: usize, tail: u64, head: u64) {
        let end = &self.ends[conn][program];
        end.ring(1).release(tail);
        end.ring(0).publish(head);
        self.rouse(program);
    }

    fn rouse(&mut self, side: usize) {
        if std::mem::take(&mut self.threads[2 + side].asleep) {
            let at = self.now + self.take(Stage::Wake, 1);
            self.threads[2 + side].worked_at = at;
            self.tell(at, Event::Step(side));
        }
    }

    /// A backend takes one message, or pumps until a flow has sent something, or ends its turn.
    fn step(&mut self, side: usize) {
        let me = 2 + side;
        if self.setting.processors < 4 && self.threads[side].running && !self.is_in_turn(side) {
            self.threads[me].deferred = true;
            return;
        }
        let mut from = self.threads[me].pumping.take().unwrap_or(0);
        if from == 0
            && let Some((conn, message)) = self.threads[me].inbox.pop_front()
        {
            return self.hear(side, conn, &message);
        }
        let resting = self.threads[me].turns.is_multiple_of(REST);
        let mut cost = 0.0;
        while from < self.ends.len() {
            let sent = self.ends[from][side].pump(resting).0;
            from += 1;
            cost += self.take(Stage::Look, 1);
            if !sent.is_empty() {
                cost += self.post(side, from - 1, sent);
                let end = self.run(me, cost, true);
                self.threads[me].pumping = Some(from);
                return self.tell(end, Event::Step(side));
            }
        }
        self.end_turn(side, cost);
    }

    fn hear(&mut self, side: usize, conn: usize, message: &[u8]) {
        let me = 2 + side;
        let (len, ahead) = self.ends[conn][side].hear(message);
        let first = !std::mem::replace(&mut self.threads[me].heard, true);
        let mut cost = self.take(Stage::Read, usize::from(first)) + self.take(Stage::Poll, 1);
        cost +=
            self.take(if ahead { Stage::HearLarge } else { Stage::Hear }, 1) + self.take(Stage::InByte, len);
        let has_room = self.asked[conn].is_some() && self.ends[conn][side].space() >= self.setting.ring / 4;
        let tells = len > 0 || side == 0 && has_room && matches!(self.work, Work::Stream { .. });
        if tells && self.sleeps(side) {
            cost += self.take(Stage::Bell, 1);
        }
        let end = self.run(me, cost, true);
        self.threads[me].worked = true;
        if tells {
            let seen = end + self.take(Stage::Transfer, 1);
            self.tell(seen, Event::Look(side, conn, false));
        }
        self.tell(end, Event::Step(side));
    }

    /// What it takes to hand messages to the fabric.
    fn post(&mut self, side: usize, conn: usize, sent: Vec<(Vec<u8>, Vec<usize>)>) -> f64 {
        let mut cost = 0.0;
        for (message, ahead) in sent {
            let large = !ahead.is_empty();
            let bytes: usize = ahead.iter().sum();
            cost += self.take(if large { Stage::PumpLarge } else { Stage::Pump }, 1);
            cost += self.take(Stage::Post, 1 + ahead.len()) + self.take(Stage::OutByte, bytes);
            let end = &mut self.ends[conn][side];
            // An acknowledgement alone, and what went ahead, count as nothing inline.
            end.sent +=
                bytes as u64 + decapsulate(&message, PayloadAt::Inline).map_or(0, |found| found.2 as u64);
            self.flight = self.flight.max((end.sent - end.flow.traffic.tx_bytes) as usize);
            self.threads[2 + side].outbox.push((conn, message, ahead));
        }
        self.threads[2 + side].worked = true;
        cost
    }

    /// Everything leaves; a backend that has found nothing yields, and after a while sleeps.
    fn end_turn(&mut self, side: usize, looks: f64) {
        let me = 2 + side;
        let worked = std::mem::take(&mut self.threads[me].worked);
        self.threads[me].heard = false;
        let outbox = std::mem::take(&mut self.threads[me].outbox);
        let mut cost = looks + self.take(Stage::Turn, 1);
        if !outbox.is_empty() {
            cost += self.take(Stage::Flush, 1);
        }
        if !worked {
            // Not always the same, or the loops of two hosts would keep step.
            cost += self.take(Stage::Idle, 1);
            cost *= self.chance() + 0.5;
        }
        let end = self.run(me, cost, worked);
        outbox.into_iter().for_each(|(conn, message, ahead)| self.leave(side, end, conn, message, &ahead));
        if std::mem::take(&mut self.threads[side].deferred) {
            self.tell(end, Event::Begin(side));
        }
        let thread = &mut self.threads[me];
        thread.turns += 1;
        if worked {
            thread.worked_at = end;
        } else if end > thread.worked_at + SPIN {
            // It sleeps only with nothing left unacknowledged.
            let rest = (0..self.ends.len()).map(|conn| (conn, self.ends[conn][side].pump(true).0));
            let rest: Vec<_> = rest.filter(|(_, sent)| !sent.is_empty()).collect();
            if rest.is_empty() && self.threads[me].inbox.is_empty() {
                self.threads[me].asleep = true;
                return;
            }
            for (conn, sent) in rest {
                self.post(side, conn, sent);
            }
        }
        self.tell(end, Event::Step(side));
    }

    /// A message, and what goes ahead of it, over the wire.
    fn leave(&mut self, side: usize, at: f64, conn: usize, message: Vec<u8>, ahead: &[usize]) {
        for &len in ahead.iter().chain([&message.len()]) {
            let cost = self.take(Stage::WireByte, len).max(self.setting.costs[Stage::Gap as usize]);
            let latency = self.take(if len > INLINE { Stage::WireLarge } else { Stage::WireSmall }, 1);
            let (free, last) = &mut self.wire[side];
            *free = at.max(*free) + cost;
            *last = last.max(*free + latency);
            if side == 0 {
                self.busy[4] += cost;
            }
        }
        self.tell(self.wire[side].1, Event::Arrive(1 - side, conn, message));
    }
}

/// Runs it until it is steady, then measures for so long (ns).
fn simulate(setting: Setting, work: Work, long: f64) -> Outcome {
    let mut pool = Pool::default();
    let mut world = World::new(setting, work, &mut pool);
    let warm = long / 4.0;
    world.run_until(warm);
    (world.trips, world.read, world.busy, world.spent) = ((0, 0.0), 0, [0.0; 5], [0.0; COUNT]);
    world.run_until(warm + long);
    let World { trips, read, busy, spent, flight, .. } = world;
    let per = match work {
        Work::Ask { .. } => trips.0 as f64,
        Work::Stream { .. } => read as f64 / (1 << 20) as f64,
    };
    Outcome {
        rate: trips.0 as f64 / long * 1e9,
        trip: trips.1 / trips.0.max(1) as f64,
        gbits: read as f64 * 8.0 / long,
        busy: busy.map(|time| time / long),
        spent: spent.map(|time| time / per),
        flight,
    }
}

fn main() {
    print!("{}", report::text());
}
