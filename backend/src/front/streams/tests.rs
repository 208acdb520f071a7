use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::*;

const CID: u64 = 3;
const PORT: u32 = 7650;

fn packet(op: u16, guest_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST,
        src_port: guest_port,
        dst_port: PORT,
        kind: STREAM,
        op,
        buf_alloc: 1 << 18,
        ..Header::default()
    }
}

fn streams() -> Streams {
    Streams::new(CID, PORT, 4)
}

fn next(streams: &mut Streams) -> Option<Header> {
    match streams.poll_rx(4096)? {
        Rx::Packet(header) => Some(header),
        Rx::Read { id, .. } => panic!("wants to read {id}"),
    }
}

/// A stream the daemon has, with its answer delivered.
fn open(streams: &mut Streams, guest_port: u32) -> u64 {
    streams.handle_packet(&packet(op::REQUEST, guest_port), &[]);
    let Some(Effect::Open { id, guest_port: of, host_port: PORT }) = streams.poll_effect() else { panic!() };
    assert_eq!((of, streams.poll_rx(64)), (guest_port, None));
    streams.handle_opened(id);
    let answer = next(streams).unwrap();
    assert_eq!((answer.op, answer.dst_port, answer.buf_alloc), (op::RESPONSE, guest_port, BUFFER));
    id
}

fn reset(streams: &mut Streams, guest_port: u32) {
    let header = next(streams).expect("a reset");
    assert_eq!((header.op, header.dst_cid, header.dst_port), (op::RST, CID, guest_port));
}

#[test]
fn bytes_go_both_ways() {
    let mut streams = streams();
    let id = open(&mut streams, 1000);
    streams.handle_packet(&Header { len: 5, ..packet(op::RW, 1000) }, b"hello");
    assert_eq!(streams.poll_effect(), Some(Effect::Write(id)));
    assert_eq!(streams.pending(id).0, b"hello");
    streams.handle_written(id, 3);
    assert_eq!(streams.pending(id).0, b"lo");
    streams.handle_readable(id);
    assert_eq!(streams.poll_rx(100), Some(Rx::Read { id, max: 100 }));
    let header = streams.handle_read(id, 70);
    assert_eq!((header.op, header.len, header.fwd_cnt), (op::RW, 70, 3));
    assert_eq!(streams.poll_rx(100), Some(Rx::Read { id, max: 100 }));
    streams.handle_empty(id);
    assert_eq!(streams.poll_rx(100), None);
}

#[test]
fn what_belongs_to_no_stream_is_reset_once() {
    let mut streams = streams();
    for op in [op::RW, op::SHUTDOWN, op::RESPONSE, op::CREDIT_UPDATE, 99] {
        streams.handle_packet(&packet(op, 9), &[]);
        reset(&mut streams, 9);
    }
    streams.handle_packet(&packet(op::RST, 9), &[]);
    assert_eq!(next(&mut streams), None);
    assert_eq!(streams.drops.of("packet-unknown-stream"), 5);

    streams.handle_packet(&Header { dst_port: 1, ..packet(op::REQUEST, 9) }, &[]);
    reset(&mut streams, 9);
    streams.handle_packet(&Header { kind: 2, ..packet(op::REQUEST, 9) }, &[]);
    assert_eq!(next(&mut streams).unwrap().kind, 2);
    streams.handle_packet(&Header { dst_cid: 1, ..packet(op::REQUEST, 9) }, &[]);
    assert_eq!(next(&mut streams).unwrap().src_cid, 1);
    streams.handle_packet(&Header { src_cid: 4, ..packet(op::REQUEST, 9) }, &[]);
    assert_eq!(next(&mut streams), None);
    let drops: Vec<_> =
        ["port-closed", "packet-type", "packet-cid"].map(|name| streams.drops.of(name)).into();
    assert_eq!((drops, streams.poll_effect()), (vec![1, 1, 2], None));
}

#[test]
fn a_guest_has_so_many_streams_and_so_many_resets() {
    let mut streams = streams();
    (0..4).for_each(|n| _ = open(&mut streams, n));
    streams.handle_packet(&packet(op::REQUEST, 5), &[]);
    reset(&mut streams, 5);
    assert_eq!(streams.drops.of("stream-limit"), 1);
    let mut sent = 0;
    while streams.wants_packets() {
        streams.handle_packet(&packet(op::RW, 6), &[]);
        sent += 1;
    }
    assert_eq!(sent, RESETS);
    next(&mut streams);
    assert!(streams.wants_packets());
}

#[test]
fn resets_and_streams_take_turns() {
    let mut streams = streams();
    let id = open(&mut streams, 1);
    (0..3).for_each(|_| streams.handle_packet(&packet(op::RW, 6), &[]));
    streams.handle_readable(id);
    let mut order = String::new();
    while let Some(rx) = streams.poll_rx(10) {
        match rx {
            Rx::Packet(_) => order.push('r'),
            Rx::Read { id, .. } => {
                order.push('s');
                if order.matches('s').count() < 3 {
                    _ = streams.handle_read(id, 1)
                } else {
                    streams.handle_empty(id)
                }
            }
        }
    }
    assert_eq!(order, "rsrsrs");
}

#[test]
fn who_sends_more_than_it_may_is_reset() {
    let mut streams = streams();
    let id = open(&mut streams, 1);
    let half = vec![1; BUFFER as usize / 2];
    streams.handle_packet(&packet(op::RW, 1), &half);
    streams.handle_packet(&packet(op::RW, 1), &half);
    assert_eq!(next(&mut streams), None, "full, and nothing new to say");
    streams.handle_written(id, half.len());
    let update = next(&mut streams).unwrap();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, BUFFER / 2));
    streams.handle_packet(&packet(op::RW, 1), &half);
    streams.handle_packet(&packet(op::RW, 1), &[1]);
    reset(&mut streams, 1);
    assert_eq!((streams.drops.of("credit-exceeded"), streams.len()), (1, 0));
}

#[test]
fn no_more_is_sent_than_the_guest_can_keep() {
    let mut streams = streams();
    streams.handle_packet(&Header { buf_alloc: 10, ..packet(op::REQUEST, 1) }, &[]);
    let Some(Effect::Open { id, .. }) = streams.poll_effect() else { panic!() };
    streams.handle_opened(id);
    next(&mut streams);
    streams.handle_readable(id);
    assert_eq!(streams.poll_rx(100), Some(Rx::Read { id, max: 10 }));
    streams.handle_read(id, 10);
    assert_eq!(next(&mut streams).unwrap().op, op::CREDIT_REQUEST);
    assert_eq!(next(&mut streams), None, "asked once");
    // One that claims to have read what it never got can keep nothing, and harms itself only.
    streams.handle_packet(&Header { buf_alloc: 10, fwd_cnt: 50, ..packet(op::CREDIT_UPDATE, 1) }, &[]);
    assert_eq!(next(&mut streams), None);
    streams.handle_packet(&Header { buf_alloc: 10, fwd_cnt: 4, ..packet(op::CREDIT_UPDATE, 1) }, &[]);
    assert_eq!(streams.poll_rx(100), Some(Rx::Read { id, max: 4 }));
}

#[test]
fn a_half_close_follows_the_bytes() {
    let mut streams = streams();
    let id = open(&mut streams, 1);
    streams.handle_packet(&packet(op::RW, 1), b"last");
    streams.handle_packet(&Header { flags: NO_SEND, ..packet(op::SHUTDOWN, 1) }, &[]);
    assert_eq!(streams.poll_effect(), Some(Effect::Write(id)));
    assert_eq!(streams.poll_effect(), None);
    streams.handle_written(id, 4);
    assert_eq!(streams.poll_effect(), Some(Effect::ShutWrite(id)));
    // The other way goes on, and its end says that all is over.
    streams.handle_readable(id);
    assert!(matches!(streams.poll_rx(9), Some(Rx::Read { .. })));
    streams.handle_read(id, 9);
    assert!(matches!(streams.poll_rx(9), Some(Rx::Read { .. })));
    streams.handle_end(id);
    let end = next(&mut streams).unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, BOTH));
    streams.handle_packet(&packet(op::RST, 1), &[]);
    assert_eq!((streams.poll_effect(), streams.len()), (Some(Effect::Close(id)), 0));
}

#[test]
fn a_guests_close_is_answered_when_all_is_handed_over() {
    let mut streams = streams();
    let id = open(&mut streams, 1);
    streams.handle_packet(&packet(op::RW, 1), b"last");
    streams.handle_packet(&Header { flags: BOTH, ..packet(op::SHUTDOWN, 1) }, &[]);
    assert_eq!(next(&mut streams), None);
    streams.handle_written(id, 4);
    reset(&mut streams, 1);
    let effects: Vec<_> = std::iter::from_fn(|| streams.poll_effect()).collect();
    assert_eq!(effects, [Effect::Write(id), Effect::ShutRead(id), Effect::Close(id)]);
    assert!(streams.is_empty());
}

#[test]
fn the_daemons_close_is_told_behind_its_bytes() {
    let mut streams = streams();
    let id = open(&mut streams, 1);
    streams.handle_readable(id);
    streams.handle_deaf(id);
    let first = next(&mut streams).unwrap();
    assert_eq!((first.op, first.flags), (op::SHUTDOWN, NO_RECEIVE));
    assert!(matches!(streams.poll_rx(9), Some(Rx::Read { .. })));
    streams.handle_end(id);
    assert_eq!(streams.poll_effect(), Some(Effect::Close(id)));
    assert_eq!(next(&mut streams).unwrap().flags, BOTH);
    // What the guest still sends is swallowed, and does not fill anything.
    for _ in 0..5 {
        streams.handle_packet(&packet(op::RW, 1), &vec![0; BUFFER as usize]);
    }
    assert_eq!((streams.len(), streams.pending(id).0.len()), (1, 0));
}

#[test]
fn a_dead_daemon_resets_what_it_had_and_a_reboot_says_nothing() {
    let mut streams = streams();
    let id = open(&mut streams, 1);
    streams.handle_packet(&packet(op::REQUEST, 2), &[]);
    let Some(Effect::Open { id: asked, .. }) = streams.poll_effect() else { panic!() };
    streams.handle_daemon_gone();
    reset(&mut streams, 1);
    assert_eq!(next(&mut streams), None, "whom the daemon was not asked about may wait for the next one");
    streams.handle_opened(asked);
    assert_eq!(next(&mut streams).unwrap().op, op::RESPONSE);
    assert_eq!(streams.poll_effect(), Some(Effect::Close(id)));
    streams.handle_packet(&packet(op::RW, 77), &[]);
    streams.handle_guest_gone();
    assert_eq!((next(&mut streams), streams.poll_effect()), (None, Some(Effect::Close(asked))));
    streams.handle_packet(&packet(op::RW, 2), &[]);
    reset(&mut streams, 2);
}

#[test]
fn packets_out_of_place_end_their_stream() {
    let table = [
        (packet(op::REQUEST, 1), "packet-second-request"),
        (packet(op::RESPONSE, 1), "packet-op"),
        (packet(0, 1), "packet-op"),
        (packet(op::SHUTDOWN, 1), "packet-flags"),
    ];
    for (bad, name) in table {
        let mut streams = streams();
        open(&mut streams, 1);
        streams.handle_packet(&bad, &[]);
        reset(&mut streams, 1);
        assert_eq!((streams.drops.of(name), streams.len()), (1, 0), "{bad:?}");
    }
    let mut streams = streams();
    streams.handle_packet(&packet(op::REQUEST, 1), &[]);
    streams.handle_packet(&packet(op::RW, 1), b"early");
    reset(&mut streams, 1);
    while streams.poll_effect().is_some() {}
    let id = open(&mut streams, 1);
    streams.handle_packet(&Header { flags: NO_SEND, ..packet(op::SHUTDOWN, 1) }, &[]);
    streams.handle_packet(&packet(op::RW, 1), b"late");
    reset(&mut streams, 1);
    assert_eq!(streams.drops.of("data-after-end"), 1);
    streams.handle_refused(id, "never");
    assert_eq!(next(&mut streams), None);
}

// ---------------------------------------------------------------- two ends

/// One stream's program in the guest, its kernel, the socket, and the daemon's program.
#[derive(Default)]
struct Pair {
    id: u64,
    open: bool,
    // The guest's kernel.
    to_send: usize,
    sent: u32,
    host_room: u32,
    host_forwarded: u32,
    received: Vec<u8>,
    unread: usize,
    ended: bool,
    host_ended: bool,
    gone: bool,
    // The socket, and the daemon.
    socket_tx: VecDeque<u8>,
    socket_tx_ended: bool,
    delivered: Vec<u8>,
    answered: usize,
    to_answer: usize,
    socket_rx: VecDeque<u8>,
    daemon_ended: bool,
}

/// What a direction carries at an offset.
fn pattern(port: u32, way: u8, at: usize) -> u8 {
    (at as u32).wrapping_mul(31).wrapping_add(port * 7) as u8 ^ (at >> 8) as u8 ^ way
}

const GUEST_ROOM: u32 = 3000;
const SOCKET_ROOM: usize = 5000;

struct World {
    streams: Streams,
    pairs: HashMap<u32, Pair>,
    seed: u64,
}

impl World {
    fn random(&mut self, below: usize) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.seed >> 33) as usize) % below.max(1)
    }

    fn header(pair: &Pair, port: u32, op: u16) -> Header {
        let forwarded = pair.received.len() as u32 - pair.unread as u32;
        Header { buf_alloc: GUEST_ROOM, fwd_cnt: forwarded, ..packet(op, port) }
    }

    fn guest(&mut self, port: u32) {
        let wish = 1 + self.random(4000);
        let read = self.random(2000);
        let Some(pair) = self.pairs.get_mut(&port).filter(|p| p.open) else { return };
        if pair.unread > 0 {
            pair.unread -= read.min(pair.unread);
            let update = Self::header(pair, port, op::CREDIT_UPDATE);
            self.streams.handle_packet(&update, &[]);
        }
        let pair = self.pairs.get_mut(&port).unwrap();
        let credit = pair.host_room - (pair.sent.wrapping_sub(pair.host_forwarded));
        let len = wish.min(credit as usize).min(pair.to_send);
        if len > 0 {
            let from = pair.sent as usize;
            let payload: Vec<u8> = (from..from + len).map(|at| pattern(port, 1, at)).collect();
            pair.to_send -= len;
            pair.sent += len as u32;
            let header = Header { len: len as u32, ..Self::header(pair, port, op::RW) };
            self.streams.handle_packet(&header, &payload);
        } else if pair.to_send == 0 && !pair.ended {
            pair.ended = true;
            let header = Header { flags: NO_SEND, ..Self::header(pair, port, op::SHUTDOWN) };
            self.streams.handle_packet(&header, &[]);
        } else if pair.ended && pair.host_ended && pair.unread == 0 && !pair.gone {
            pair.gone = true;
            let header = Header { flags: BOTH, ..Self::header(pair, port, op::SHUTDOWN) };
            self.streams.handle_packet(&header, &[]);
        }
        self.effects();
    }

    fn write(&mut self, id: u64) {
        let port = *self.pairs.iter().find(|(_, p)| p.id == id).unwrap().0;
        let some = 1 + self.random(3000);
        let pair = self.pairs.get_mut(&port).unwrap();
        let (a, b) = self.streams.pending(id);
        let len = (a.len() + b.len()).min(some).min(SOCKET_ROOM - pair.socket_tx.len());
        pair.socket_tx.extend(a.iter().chain(b).take(len));
        self.streams.handle_written(id, len);
    }

    fn effects(&mut self) {
        while let Some(effect) = self.streams.poll_effect() {
            match effect {
                Effect::Open { id, guest_port, .. } => {
                    self.pairs.get_mut(&guest_port).unwrap().id = id;
                    self.streams.handle_opened(id);
                }
                Effect::Write(id) => self.write(id),
                Effect::ShutWrite(id) => {
                    let pair = self.pairs.values_mut().find(|p| p.id == id).unwrap();
                    assert!(!pair.socket_tx_ended);
                    pair.socket_tx_ended = true;
                }
                Effect::Close(id) => {
                    self.pairs.values_mut().find(|p| p.id == id).unwrap().socket_tx_ended = true
                }
                Effect::ShutRead(_) => {}
            }
        }
    }

    fn daemon(&mut self, port: u32) {
        let (take, give) = (self.random(4000), self.random(4000));
        let Some(pair) = self.pairs.get_mut(&port).filter(|p| p.id != 0) else { return };
        let (id, len) = (pair.id, take.min(pair.socket_tx.len()));
        pair.delivered.extend(pair.socket_tx.drain(..len));
        let len = give.min(pair.to_answer).min(SOCKET_ROOM - pair.socket_rx.len());
        let from = pair.answered;
        pair.socket_rx.extend((from..from + len).map(|at| pattern(port, 2, at)));
        (pair.answered, pair.to_answer) = (from + len, pair.to_answer - len);
        let ends = pair.to_answer == 0 && !std::mem::replace(&mut pair.daemon_ended, pair.to_answer == 0);
        if len > 0 || ends {
            self.streams.handle_readable(id);
        }
        self.write(id);
        self.effects();
    }

    fn deliver(&mut self) {
        let room = 1 + self.random(2000);
        let some = 1 + self.random(2000);
        let (header, payload) = match self.streams.poll_rx(room) {
            None => return,
            Some(Rx::Packet(header)) => (header, vec![]),
            Some(Rx::Read { id, max }) => {
                let pair = self.pairs.values_mut().find(|p| p.id == id).unwrap();
                let len = max.min(some).min(pair.socket_rx.len());
                if len == 0 {
                    match pair.daemon_ended {
                        true => self.streams.handle_end(id),
                        false => self.streams.handle_empty(id),
                    }
                    return;
                }
                let payload: Vec<u8> = pair.socket_rx.drain(..len).collect();
                (self.streams.handle_read(id, len), payload)
            }
        };
        let pair = self.pairs.get_mut(&header.dst_port).unwrap();
        (pair.host_room, pair.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
        match header.op {
            op::RESPONSE => pair.open = true,
            op::RW => {
                pair.received.extend(&payload);
                pair.unread += payload.len();
                assert!(pair.unread <= GUEST_ROOM as usize, "more than the guest can keep");
            }
            op::SHUTDOWN => pair.host_ended |= header.flags & NO_SEND != 0,
            op::RST => assert!(pair.gone, "a reset of nobody's doing"),
            op::CREDIT_REQUEST => {
                let update = Self::header(pair, header.dst_port, op::CREDIT_UPDATE);
                self.streams.handle_packet(&update, &[]);
            }
            _ => {}
        }
        self.effects();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 48 }))]

    #[test]
    fn every_byte_arrives_both_ways_and_then_the_ends(seed in any::<u64>(), sizes in prop::collection::vec((0usize..200_000, 0usize..60_000), 1..4)) {
        let mut world = World { streams: streams(), pairs: HashMap::new(), seed };
        for (n, (there, back)) in sizes.iter().enumerate() {
            let port = 1000 + n as u32;
            world.pairs.insert(port, Pair { to_send: *there, to_answer: *back, ..Pair::default() });
            world.streams.handle_packet(&Header { buf_alloc: GUEST_ROOM, ..packet(op::REQUEST, port) }, &[]);
            world.effects();
        }
        for _ in 0..40_000 {
            let port = 1000 + world.random(sizes.len()) as u32;
            match world.random(3) {
                0 => world.guest(port),
                1 => world.daemon(port),
                _ => world.deliver(),
            }
            if world.streams.is_empty() {
                break;
            }
        }
        prop_assert!(world.streams.is_empty(), "something stands still");
        prop_assert_eq!(world.streams.drops.iter().count(), 0);
        for (n, (there, back)) in sizes.iter().enumerate() {
            let pair = &world.pairs[&(1000 + n as u32)];
            prop_assert!(pair.socket_tx_ended && pair.host_ended);
            let all: Vec<u8> = pair.delivered.iter().chain(&pair.socket_tx).copied().collect();
            let want = |way, len| (0..len).map(|at| pattern(1000 + n as u32, way, at)).collect::<Vec<_>>();
            prop_assert!(all == want(1, *there), "to the daemon");
            prop_assert!(pair.received == want(2, *back), "to the guest");
        }
    }

    /// Whatever a guest sends and a daemon does: bounds hold, and each end that was made is closed.
    #[test]
    fn an_adversary_gets_nothing(steps in prop::collection::vec((0u8..16, 0u16..9, 0u32..6, any::<u32>(), 0u32..4, any::<u32>()), 1..400)) {
        let mut streams = streams();
        let mut ends = std::collections::HashSet::new();
        for (what, op, port, alloc, flags, fwd) in steps {
            let id = u64::from(fwd % 12);
            match what {
                0..8 => {
                    let header = Header { flags, buf_alloc: alloc, fwd_cnt: fwd, ..packet(op, port) };
                    let header = match what {
                        0 => Header { src_cid: fwd.into(), ..header },
                        1 => Header { dst_cid: fwd.into(), dst_port: alloc, ..header },
                        2 => Header { kind: fwd as u16, ..header },
                        _ => header,
                    };
                    if streams.wants_packets() {
                        streams.handle_packet(&header, &vec![0; (alloc as usize) % (MAX_PAYLOAD + 1)]);
                    }
                }
                8 => streams.handle_bad_packet(&packet(op, port), "bad"),
                9 => streams.handle_readable(id),
                10 => streams.handle_deaf(id),
                11 => streams.handle_written(id, (alloc as usize % 70_000).min(streams.pending(id).0.len())),
                12 if fwd % 7 == 0 => streams.handle_daemon_gone(),
                12 if fwd % 11 == 0 => streams.handle_guest_gone(),
                12 => streams.handle_fault(id, Some("fault")),
                _ => match streams.poll_rx(fwd as usize % 5000) {
                    Some(Rx::Read { id, max }) => match alloc % 4 {
                        0 => streams.handle_empty(id),
                        1 => streams.handle_end(id),
                        2 => streams.handle_fault(id, None),
                        _ => {
                            prop_assert!(max > 0);
                            let header = streams.handle_read(id, 1 + fwd as usize % max);
                            prop_assert_eq!(header.op, op::RW);
                        }
                    },
                    Some(Rx::Packet(header)) => prop_assert_ne!(header.op, op::RW),
                    None => {}
                },
            }
            while let Some(effect) = streams.poll_effect() {
                match effect {
                    Effect::Open { id, .. } if id % 5 == 0 => streams.handle_refused(id, "refused"),
                    Effect::Open { id, .. } => {
                        ends.insert(id);
                        streams.handle_opened(id);
                    }
                    Effect::Close(id) => _ = ends.remove(&id),
                    _ => {}
                }
            }
            prop_assert!(streams.len() <= 4 && streams.resets.len() <= RESETS);
            prop_assert!(streams.streams.values().all(|s| s.tx.len() <= BUFFER as usize));
            prop_assert!(streams.ready.len() <= 4 * streams.len() + 16);
            prop_assert_eq!(streams.by_ports.len(), streams.len());
        }
        streams.handle_stop();
        while streams.poll_rx(1 << 16).is_some() {}
        while let Some(effect) = streams.poll_effect() {
            if let Effect::Close(id) = effect { ends.remove(&id); }
        }
        prop_assert!(ends.is_empty() && streams.is_empty());
    }
}
