//! The fabric's contract, once, for every fabric: what is true here may be relied on.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use vsocket_backend::fabric::soft::{Options, Soft};
use vsocket_backend::fabric::{
    Access, Disconnect, DomainId, Endpoint, Event, Fabric, Fault, Kind, LocalRange, MAX_GATHER, MAX_SEND,
    MemoryKey, PostError, QpId, Region, RemoteAddress, Signal, Status, WorkId, loopback,
};

/// An event, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Connected(QpId),
    Received(QpId, Vec<u8>),
    Completed(QpId, u64, Status),
    Room(QpId),
    Disconnected(QpId, Disconnect),
    Refused,
}

fn own(event: Event<'_>) -> Seen {
    match event {
        Event::Connected { qp } => Seen::Connected(qp),
        Event::Received { qp, payload } => Seen::Received(qp, payload.to_vec()),
        Event::Completed { qp, work, status } => Seen::Completed(qp, work.0, status),
        Event::Room { qp } => Seen::Room(qp),
        Event::Disconnected { qp, reason } => Seen::Disconnected(qp, reason),
        Event::Refused { .. } => Seen::Refused,
    }
}

/// Two fabrics and what was seen at each.
struct Pair {
    ends: [Box<dyn Fabric>; 2],
    seen: [Vec<Seen>; 2],
    secrets: u8,
}

/// One end of a connected queue pair with its domain.
#[derive(Clone, Copy)]
struct End {
    qp: QpId,
    domain: DomainId,
}

impl Pair {
    fn new(a: impl Fabric + 'static, b: impl Fabric + 'static) -> Self {
        Self { ends: [Box::new(a), Box::new(b)], seen: [Vec::new(), Vec::new()], secrets: 0 }
    }

    /// A device tells of a remote error only that it was one.
    fn told(&self, fault: Fault) -> Fault {
        if self.ends[0].kind() == Kind::Verbs { Fault::Refused } else { fault }
    }

    /// Takes all events there are now.
    fn turn(&mut self) {
        for (end, seen) in self.ends.iter_mut().zip(&mut self.seen) {
            end.flush();
            while let Some(event) = end.poll() {
                seen.push(own(event));
            }
        }
    }

    /// Turns until `done`, or fails.
    fn until(&mut self, what: &str, mut done: impl FnMut(&[Vec<Seen>; 2]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(&self.seen) {
            assert!(Instant::now() < deadline, "{what}: {:?}", self.seen.each_ref().map(|s| s.len()));
            self.turn();
            thread::yield_now();
        }
    }

    fn connect(&mut self) -> [End; 2] {
        let domains = [self.ends[0].open_domain(), self.ends[1].open_domain()];
        self.connect_in(domains)
    }

    fn connect_in(&mut self, domains: [DomainId; 2]) -> [End; 2] {
        self.secrets += 1;
        let (secret, now) = ([self.secrets; 32], Instant::now());
        let (passive, offer) = self.ends[1].expect(domains[1], 100, secret, now).unwrap();
        let (active, answer) = self.ends[0].dial(domains[0], 100, secret, &offer, now).unwrap();
        self.ends[1].accept(passive, &answer).unwrap();
        let both = [Seen::Connected(active), Seen::Connected(passive)];
        self.until("connect", |seen| seen[0].contains(&both[0]) && seen[1].contains(&both[1]));
        assert!(self.ends.iter().all(|end| end.next_deadline().is_none()), "no timer once connected");
        [End { qp: active, domain: domains[0] }, End { qp: passive, domain: domains[1] }]
    }

    fn send(&mut self, end: usize, qp: QpId, work: u64, bytes: &[u8]) -> Result<(), PostError> {
        self.ends[end].post_send(qp, WorkId(work), &[bytes], Signal::Yes)
    }

    fn write(
        &mut self,
        end: usize,
        qp: QpId,
        work: u64,
        local: LocalRange,
        remote: RemoteAddress,
    ) -> Result<(), PostError> {
        self.ends[end].post_write(qp, WorkId(work), local, remote, Signal::Yes)
    }
}

fn at(key: MemoryKey, offset: u64) -> RemoteAddress {
    RemoteAddress { rkey: key.rkey, address: key.base + offset }
}

fn range(key: MemoryKey, offset: usize, len: usize) -> LocalRange {
    LocalRange { lkey: key.lkey, offset, len }
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

fn filled(len: usize, seed: u32) -> Region {
    let region = Region::private(len);
    assert!(region.copy_in(0, &pattern(len, seed)));
    region
}

fn content(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0; region.len()];
    assert!(region.copy_out(0, &mut bytes));
    bytes
}

fn received(seen: &[Seen]) -> Vec<Vec<u8>> {
    let payload = |seen: &Seen| match seen {
        Seen::Received(_, bytes) => Some(bytes.clone()),
        _ => None,
    };
    seen.iter().filter_map(payload).collect()
}

fn completed(seen: &[Seen], status: Status) -> Vec<u64> {
    let number = |seen: &Seen| match seen {
        Seen::Completed(_, work, with) if *with == status => Some(*work),
        _ => None,
    };
    seen.iter().filter_map(number).collect()
}

fn disconnected(seen: &[Seen]) -> Option<Disconnect> {
    seen.iter().find_map(|seen| match seen {
        Seen::Disconnected(_, reason) => Some(reason.clone()),
        _ => None,
    })
}

fn sends_arrive_whole_and_in_order(mut pair: Pair) {
    let [a, b] = pair.connect();
    let sizes = [0, 1, 2, 3, 4, 63, 64, 1000, MAX_SEND];
    for (work, size) in sizes.into_iter().enumerate() {
        pair.send(0, a.qp, work as u64, &pattern(size, 1)).unwrap();
        pair.send(1, b.qp, work as u64, &pattern(size, 2)).unwrap();
    }
    pair.until("messages", |seen| seen.iter().all(|seen| received(seen).len() == sizes.len()));
    for (end, seed) in [(0, 2), (1, 1)] {
        assert_eq!(received(&pair.seen[end]), sizes.map(|size| pattern(size, seed)));
        assert_eq!(completed(&pair.seen[end], Status::Done), (0..sizes.len() as u64).collect::<Vec<_>>());
    }
}

fn gather_is_joined(mut pair: Pair) {
    let [a, _] = pair.connect();
    pair.ends[0].post_send(a.qp, WorkId(1), &[b"one", b"", b"two", b"three"], Signal::No).unwrap();
    pair.until("message", |seen| !received(&seen[1]).is_empty());
    assert_eq!(received(&pair.seen[1]), [b"onetwothree"]);
    assert_eq!(completed(&pair.seen[0], Status::Done), [] as [u64; 0], "not signalled");
}

fn a_write_is_there_before_the_send_after_it(mut pair: Pair) {
    const LEN: usize = 300_000;
    let [a, b] = pair.connect();
    let target = Region::private(LEN);
    let key = pair.ends[1].register(b.domain, target.clone(), Access::RemoteWrite).unwrap();
    for round in 0..40_u32 {
        let source = filled(LEN, round);
        let local = pair.ends[0].register(a.domain, source.clone(), Access::Local).unwrap();
        pair.write(0, a.qp, 1, range(local, 0, LEN), at(key, 0)).unwrap();
        pair.send(0, a.qp, 2, &round.to_be_bytes()).unwrap();
        // The source may be forgotten at once: what was posted keeps it.
        pair.ends[0].deregister(local).unwrap();
        drop(source);
        // One event at a time: nothing after the SEND may be needed.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < deadline, "round {round}");
            pair.ends[0].flush();
            while pair.ends[0].poll().is_some() {}
            if let Some(Event::Received { payload, .. }) = pair.ends[1].poll() {
                assert_eq!(payload, round.to_be_bytes());
                assert!(content(&target) == pattern(LEN, round), "round {round}");
                break;
            }
        }
    }
}

fn writes_of_all_sizes_land_where_they_should(mut pair: Pair) {
    const LEN: usize = 1 << 20;
    let [a, b] = pair.connect();
    let (source, target) = (filled(LEN, 9), Region::private(LEN));
    let local = pair.ends[0].register(a.domain, source, Access::Local).unwrap();
    let key = pair.ends[1].register(b.domain, target.clone(), Access::RemoteWrite).unwrap();
    let mut expected = vec![0; LEN];
    let whole = pattern(LEN, 9);
    let sizes = [0, 1, 5, 2047, 2048, 2049, 4096, 61439, 61440, 61441, 65536, 122_881, 200_001, LEN / 2];
    let mut offset = 0;
    for (work, size) in sizes.into_iter().enumerate() {
        let to = (offset * 7 + 3) % (LEN - size + 1);
        let (from, to_address) = (range(local, offset % 1000, size), at(key, to as u64));
        while pair.write(0, a.qp, work as u64, from, to_address) == Err(PostError::Full) {
            pair.turn();
        }
        expected[to..to + size].copy_from_slice(&whole[offset % 1000..offset % 1000 + size]);
        offset += size + 1;
        while pair.send(0, a.qp, 100 + work as u64, &pattern(work * 50, 3)) == Err(PostError::Full) {
            pair.turn();
        }
    }
    pair.until("messages", |seen| received(&seen[1]).len() == sizes.len());
    assert!(content(&target) == expected);
    for (work, message) in received(&pair.seen[1]).iter().enumerate() {
        assert_eq!(*message, pattern(work * 50, 3));
    }
}

/// Breaks one rule with a WRITE; both ends must hear which, and outstanding work must be flushed.
fn broken_write(pair: &mut Pair, a: End, local: LocalRange, remote: RemoteAddress, expected: Fault) {
    pair.write(0, a.qp, 1, local, remote).unwrap();
    pair.send(0, a.qp, 2, b"never seen").unwrap();
    let expected = pair.told(expected);
    pair.until("both ends hear", |seen| seen.iter().all(|seen| disconnected(seen).is_some()));
    assert_eq!(disconnected(&pair.seen[0]), Some(Disconnect::Terminated(expected)));
    assert_eq!(disconnected(&pair.seen[1]), Some(Disconnect::PeerFault(expected)));
    assert!(received(&pair.seen[1]).is_empty());
    assert_eq!(pair.send(0, a.qp, 3, b""), Err(PostError::NotConnected));
    assert!(matches!(pair.seen[0].last(), Some(Seen::Disconnected(..))), "the last event");
}

fn a_wrong_key_ends_the_queue_pair(mut pair: Pair) {
    let [a, b] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let key = pair.ends[1].register(b.domain, Region::private(64), Access::RemoteWrite).unwrap();
    let wrong = RemoteAddress { rkey: key.rkey ^ 0x5555_5500, address: key.base };
    broken_write(&mut pair, a, range(local, 0, 64), wrong, Fault::InvalidTag);
}

fn wrong_bounds_end_the_queue_pair(mut pair: Pair) {
    let [a, b] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let target = Region::private(64);
    let key = pair.ends[1].register(b.domain, target.clone(), Access::RemoteWrite).unwrap();
    broken_write(&mut pair, a, range(local, 0, 64), at(key, 1), Fault::Bounds);
    assert_eq!(content(&target), [0; 64], "nothing was placed");
}

fn a_private_region_cannot_be_written(mut pair: Pair) {
    let [a, b] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let key = pair.ends[1].register(b.domain, Region::private(64), Access::Local).unwrap();
    broken_write(&mut pair, a, range(local, 0, 64), at(key, 0), Fault::AccessRights);
}

fn another_domain_cannot_be_written(mut pair: Pair) {
    let [a, _] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let other = pair.ends[1].open_domain();
    let target = Region::private(64);
    let key = pair.ends[1].register(other, target.clone(), Access::RemoteWrite).unwrap();
    broken_write(&mut pair, a, range(local, 0, 64), at(key, 0), Fault::WrongDomain);
    assert_eq!(content(&target), [0; 64], "nothing was placed");
}

fn a_region_taken_back_cannot_be_written(mut pair: Pair) {
    let [a, b] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let key = pair.ends[1].register(b.domain, Region::private(64), Access::RemoteWrite).unwrap();
    pair.ends[1].deregister(key).unwrap();
    broken_write(&mut pair, a, range(local, 0, 64), at(key, 0), Fault::InvalidTag);
}

fn a_fault_leaves_other_queue_pairs_alone(mut pair: Pair) {
    let [a, b] = pair.connect();
    let [other, _] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let key = pair.ends[1].register(b.domain, Region::private(64), Access::RemoteWrite).unwrap();
    broken_write(&mut pair, a, range(local, 0, 64), at(key, 1), Fault::Bounds);
    pair.send(0, other.qp, 9, b"still here").unwrap();
    pair.until("the other", |seen| received(&seen[1]) == [b"still here"]);
}

/// The end that finds the fault has a stream half out: what it has begun is finished, and the peer still hears why.
fn a_fault_is_told_in_the_middle_of_sending(mut pair: Pair) {
    const LEN: usize = 100_000;
    let [a, b] = pair.connect();
    let source = pair.ends[0].register(a.domain, filled(LEN, 5), Access::Local).unwrap();
    let target = pair.ends[0].register(a.domain, Region::private(64), Access::RemoteWrite).unwrap();
    let sink = pair.ends[1].register(b.domain, Region::private(LEN), Access::RemoteWrite).unwrap();
    let wrong = pair.ends[1].register(b.domain, Region::private(64), Access::Local).unwrap();
    let mut posted = 0;
    while pair.write(0, a.qp, posted, range(source, 0, LEN), at(sink, 0)) == Ok(())
        && pair.send(0, a.qp, posted + 1, &[3; 999]) == Ok(())
    {
        posted += 2;
        pair.ends[0].flush();
    }
    pair.write(1, b.qp, 7, range(wrong, 0, 64), at(target, 1)).unwrap();
    pair.ends[1].flush();
    let deadline = Instant::now() + Duration::from_secs(10);
    while disconnected(&pair.seen[0]).is_none() {
        assert!(Instant::now() < deadline);
        while let Some(event) = pair.ends[0].poll() {
            pair.seen[0].push(own(event));
        }
        // In memory, nothing is carried before its poster turns again.
        pair.ends[1].flush();
    }
    let expected = pair.told(Fault::Bounds);
    assert_eq!(disconnected(&pair.seen[0]), Some(Disconnect::PeerFault(expected)));
    let (done, flushed) = (completed(&pair.seen[0], Status::Done), completed(&pair.seen[0], Status::Flushed));
    // A device's own buffers may have taken all of it.
    assert!(pair.ends[0].kind() == Kind::Verbs || !flushed.is_empty());
    assert!((done.len() + flushed.len()) as u64 >= posted, "each once");
    pair.until("the reason", |seen| disconnected(&seen[1]).is_some());
    assert_eq!(disconnected(&pair.seen[1]), Some(Disconnect::Terminated(expected)));
    assert!(received(&pair.seen[1]).iter().all(|message| *message == [3; 999]));
}

fn local_mistakes_are_refused_at_once(mut pair: Pair) {
    let [a, b] = pair.connect();
    let local = pair.ends[0].register(a.domain, filled(64, 1), Access::Local).unwrap();
    let key = pair.ends[1].register(b.domain, Region::private(64), Access::RemoteWrite).unwrap();
    let other = pair.ends[0].open_domain();
    let foreign = pair.ends[0].register(other, Region::private(64), Access::Local).unwrap();
    assert_eq!(pair.write(0, a.qp, 1, range(local, 1, 64), at(key, 0)), Err(PostError::Bounds));
    assert_eq!(pair.write(0, a.qp, 1, range(foreign, 0, 64), at(key, 0)), Err(PostError::UnknownRegion));
    assert_eq!(pair.send(0, a.qp, 1, &[0; MAX_SEND + 1]), Err(PostError::TooLong));
    let many = [b"x".as_slice(); MAX_GATHER + 1];
    assert_eq!(pair.ends[0].post_send(a.qp, WorkId(1), &many, Signal::No), Err(PostError::TooLong));
    pair.send(0, a.qp, 2, b"unharmed").unwrap();
    pair.until("message", |seen| received(&seen[1]) == [b"unharmed"]);
}

fn a_full_queue_says_so_and_recovers(mut pair: Pair) {
    let [a, _] = pair.connect();
    let (mut posted, body) = (0_u64, pattern(4096, 4));
    // Nobody reads: sooner or later it is full.
    while pair.send(0, a.qp, posted, &body) == Ok(()) {
        posted += 1;
        pair.ends[0].flush();
        assert!(posted < 1_000_000, "never full");
    }
    pair.until("all of it", |seen| received(&seen[1]).len() as u64 == posted);
    pair.until("room", |seen| seen[0].contains(&Seen::Room(a.qp)));
    // A device acknowledges what it has received a little later.
    pair.until("reports", |seen| completed(&seen[0], Status::Done).len() as u64 == posted);
    assert_eq!(completed(&pair.seen[0], Status::Done), (0..posted).collect::<Vec<_>>());
    assert!(received(&pair.seen[1]).iter().all(|message| *message == body));
    pair.send(0, a.qp, posted, b"again").unwrap();
    pair.until("one more", |seen| received(&seen[1]).last().is_some_and(|last| last == b"again"));
}

fn the_death_of_a_peer_flushes_what_is_outstanding(mut pair: Pair) {
    let [a, _] = pair.connect();
    let mut posted = 0;
    while pair.send(0, a.qp, posted, &[1; 4096]) == Ok(()) {
        posted += 1;
        pair.ends[0].flush();
    }
    let (survivor, _) = loopback::pair().unwrap();
    pair.ends[1] = Box::new(survivor);
    pair.until("the news", |seen| disconnected(&seen[0]).is_some());
    assert_eq!(disconnected(&pair.seen[0]), Some(Disconnect::PeerClosed));
    let (done, flushed) = (completed(&pair.seen[0], Status::Done), completed(&pair.seen[0], Status::Flushed));
    assert!(!flushed.is_empty());
    let all: Vec<u64> = done.into_iter().chain(flushed).collect();
    assert_eq!(all, (0..posted).collect::<Vec<_>>(), "each once, in order");
}

fn close_flushes_and_tells_both(mut pair: Pair) {
    let [a, b] = pair.connect();
    pair.send(0, a.qp, 1, b"not flushed").unwrap();
    pair.ends[0].close(a.qp);
    pair.until("both", |seen| seen.iter().all(|seen| disconnected(seen).is_some()));
    assert_eq!(completed(&pair.seen[0], Status::Flushed), [1]);
    assert_eq!(disconnected(&pair.seen[0]), Some(Disconnect::Closed));
    assert_eq!(disconnected(&pair.seen[1]), Some(Disconnect::PeerClosed));
    assert_eq!(pair.send(1, b.qp, 1, b""), Err(PostError::NotConnected));
    let [again, _] = pair.connect();
    assert_ne!(again.qp, a.qp, "names are not used twice");
}

fn a_wrong_secret_is_rejected(mut pair: Pair) {
    let domains = [pair.ends[0].open_domain(), pair.ends[1].open_domain()];
    let now = Instant::now();
    let (expected, offer) = pair.ends[1].expect(domains[1], 100, [1; 32], now).unwrap();
    assert!(pair.ends[1].expect(domains[1], 100, [1; 32], now).is_err(), "a secret serves once");
    let (dialled, answer) = pair.ends[0].dial(domains[0], 100, [2; 32], &offer, now).unwrap();
    pair.ends[1].accept(expected, &answer).unwrap();
    pair.until("rejection", |seen| seen[0].contains(&Seen::Disconnected(dialled, Disconnect::Rejected)));
    assert_eq!(pair.send(0, dialled, 1, b""), Err(PostError::NotConnected));
    let deadline = pair.ends[1].next_deadline().expect("somebody is expected");
    pair.ends[1].handle_timeout(deadline);
    pair.until("timeout", |seen| seen[1].contains(&Seen::Disconnected(expected, Disconnect::TimedOut)));
    assert_eq!(pair.ends[1].next_deadline(), None);
}

fn many_registrations_do_not_mix(mut pair: Pair) {
    const MANY: usize = 3000;
    let [a, b] = pair.connect();
    let targets: Vec<Region> = (0..MANY).map(|_| Region::private(64)).collect();
    let register =
        |target: &Region| pair.ends[1].register(b.domain, target.clone(), Access::RemoteWrite).unwrap();
    let keys: Vec<MemoryKey> = targets.iter().map(register).collect();
    let source = Region::private(MANY * 8);
    for n in 0..MANY {
        assert!(source.copy_in(n * 8, &(n as u64).to_be_bytes()));
    }
    let local = pair.ends[0].register(a.domain, source, Access::Local).unwrap();
    for (n, &key) in keys.iter().enumerate() {
        while pair.write(0, a.qp, n as u64, range(local, n * 8, 8), at(key, 8)) == Err(PostError::Full) {
            pair.turn();
        }
    }
    while pair.send(0, a.qp, MANY as u64, b"done") == Err(PostError::Full) {
        pair.turn();
    }
    pair.until("done", |seen| !received(&seen[1]).is_empty());
    for (n, target) in targets.iter().enumerate() {
        assert_eq!(content(target)[8..16], (n as u64).to_be_bytes());
    }
    pair.ends[1].close_domain(b.domain);
    assert!(pair.ends[1].register(b.domain, Region::private(1), Access::Local).is_err());
    pair.until("closed", |seen| disconnected(&seen[0]).is_some());
}

fn a_slow_receiver_loses_nothing(mut pair: Pair) {
    const MANY: u64 = 1500;
    let [a, _] = pair.connect();
    let (mut posted, mut heard) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while heard < MANY {
        assert!(Instant::now() < deadline, "{heard} of {posted}");
        while posted < MANY {
            let size = (posted % 7 * 600) as usize;
            let bytes = pattern(size, posted as u32);
            match pair.ends[0].post_send(a.qp, WorkId(posted), &[&bytes], Signal::No) {
                Ok(()) => posted += 1,
                Err(error) => {
                    assert_eq!(error, PostError::Full);
                    break;
                }
            }
        }
        pair.ends[0].flush();
        while let Some(event) = pair.ends[0].poll() {
            assert!(matches!(event, Event::Room { .. }), "{event:?}");
        }
        // Ten for each of the sender's turns: its queue and all buffers between are soon full.
        for _ in 0..10 {
            match pair.ends[1].poll() {
                Some(Event::Received { payload, .. }) => {
                    assert!(payload == pattern((heard % 7 * 600) as usize, heard as u32), "message {heard}");
                    heard += 1;
                }
                other => assert_eq!(other, None),
            }
        }
    }
}

fn writes_without_reports_do_not_run_dry(mut pair: Pair) {
    const LEN: usize = 5000;
    let [a, b] = pair.connect();
    let source = pair.ends[0].register(a.domain, filled(LEN, 3), Access::Local).unwrap();
    let target = Region::private(LEN);
    let key = pair.ends[1].register(b.domain, target.clone(), Access::RemoteWrite).unwrap();
    for round in 0..2000 {
        let (local, remote) = (range(source, 0, LEN), at(key, 0));
        while pair.ends[0].post_write(a.qp, WorkId(round), local, remote, Signal::No) == Err(PostError::Full)
        {
            pair.ends[0].flush();
            while let Some(event) = pair.ends[0].poll() {
                assert!(matches!(event, Event::Room { .. }), "{event:?}");
            }
            assert_eq!(pair.ends[1].poll(), None, "a WRITE is not reported");
        }
    }
    while pair.send(0, a.qp, 9, b"end") == Err(PostError::Full) {
        pair.turn();
    }
    pair.until("end", |seen| received(&seen[1]) == [b"end"]);
    assert!(content(&target) == pattern(LEN, 3));
}

fn a_write_longer_than_any_packet_or_buffer(mut pair: Pair) {
    // More than the longest message of Soft-RoCE, 8 MiB.
    const LEN: usize = (9 << 20) + 5;
    let [a, b] = pair.connect();
    let source = pair.ends[0].register(a.domain, filled(LEN, 4), Access::Local).unwrap();
    let target = Region::private(LEN);
    let key = pair.ends[1].register(b.domain, target.clone(), Access::RemoteWrite).unwrap();
    pair.write(0, a.qp, 1, range(source, 0, LEN), at(key, 0)).unwrap();
    while pair.send(0, a.qp, 2, b"all of it") == Err(PostError::Full) {
        pair.turn();
    }
    pair.until("message", |seen| received(&seen[1]) == [b"all of it"]);
    assert!(content(&target) == pattern(LEN, 4));
    pair.until("reports", |seen| completed(&seen[0], Status::Done) == [1, 2]);
}

fn things_may_be_taken_down_in_any_order(mut pair: Pair) {
    for order in 0..6 {
        let [a, b] = pair.connect();
        let source = pair.ends[0].register(a.domain, filled(64, 1), Access::RemoteWrite).unwrap();
        let target = pair.ends[1].register(b.domain, Region::private(64), Access::RemoteWrite).unwrap();
        pair.write(0, a.qp, 1, range(source, 0, 64), at(target, 0)).unwrap();
        pair.send(0, a.qp, 2, b"before").unwrap();
        if order % 2 == 0 {
            pair.until("message", |seen| received(&seen[1]).last().is_some_and(|m| m == b"before"));
        }
        match order / 2 {
            0 => pair.ends[0].close_domain(a.domain),
            1 => {
                // On a device the WRITE may fail for it; nothing may crash for it.
                pair.ends[0].deregister(source).unwrap();
                pair.ends[0].close(a.qp);
                pair.ends[0].close(a.qp);
                pair.ends[0].close_domain(a.domain);
            }
            _ => {
                pair.ends[0].close(a.qp);
                pair.ends[1].close_domain(b.domain);
                pair.ends[1].close(b.qp);
                pair.ends[0].close_domain(a.domain);
                pair.ends[0].close_domain(a.domain);
            }
        }
        assert!(pair.ends[0].deregister(source).is_err(), "gone with its domain");
        assert!(pair.ends[0].register(a.domain, Region::private(8), Access::Local).is_err());
        assert_eq!(pair.send(0, a.qp, 3, b""), Err(PostError::NotConnected));
        let gone = |seen: &[Seen]| seen.iter().any(|s| matches!(s, Seen::Disconnected(qp, _) if *qp == a.qp));
        pair.until("the end here", |seen| gone(&seen[0]));
        pair.ends[1].close_domain(b.domain);
        pair.seen = [Vec::new(), Vec::new()];
    }
    let [a, _] = pair.connect();
    pair.send(0, a.qp, 1, b"after").unwrap();
    pair.until("message", |seen| received(&seen[1]).last().is_some_and(|m| m == b"after"));
}

fn another_kind_of_fabric_is_refused_by_name(mut pair: Pair) {
    let ours = pair.ends[0].kind();
    let domain = pair.ends[0].open_domain();
    let theirs = Kind::ALL.into_iter().filter(|kind| *kind != ours).map(|kind| Endpoint::new(kind, &[1; 20]));
    let unknown = Endpoint::parse(&[99; Endpoint::LEN]);
    for offer in theirs.chain([unknown]) {
        let error = pair.ends[0].dial(domain, 100, [1; 32], &offer, Instant::now()).unwrap_err();
        let expected = format!("the other end has {}, this one {}", offer.kind_name(), ours.name());
        assert_eq!(error.to_string(), expected);
    }
    // The right kind, and nonsense in it: an error, or a queue pair that does not come to be.
    let nonsense = Endpoint::new(ours, &[0xee; Endpoint::BYTES]);
    if ours != Kind::Memory {
        assert!(pair.ends[0].dial(domain, 100, [1; 32], &nonsense, Instant::now()).is_err());
    }
    assert_eq!(pair.ends[0].facts().queue_pairs, 0);
}

fn queue_pairs_do_not_mix(mut pair: Pair) {
    const MANY: usize = 20;
    let ends: Vec<_> = (0..MANY).map(|_| pair.connect()).collect();
    assert_eq!(pair.ends[0].facts().queue_pairs, MANY);
    for round in 0..10_u8 {
        for (n, [a, b]) in ends.iter().enumerate() {
            pair.send(0, a.qp, 1, &[n as u8, round]).unwrap();
            pair.send(1, b.qp, 1, &[n as u8, round, 0]).unwrap();
        }
    }
    pair.until("messages", |seen| seen.iter().all(|seen| received(seen).len() == MANY * 10));
    for (n, [a, b]) in ends.iter().enumerate() {
        for (end, qp) in [(1, b.qp), (0, a.qp)] {
            let of = |seen: &Seen| match seen {
                Seen::Received(from, bytes) if *from == qp => Some((bytes[0] as usize, bytes[1])),
                _ => None,
            };
            let heard: Vec<_> = pair.seen[end].iter().filter_map(of).collect();
            assert_eq!(heard, (0..10).map(|round| (n, round)).collect::<Vec<_>>());
        }
    }
}

fn the_descriptor_wakes_a_sleeper(mut pair: Pair) {
    use mio::unix::SourceFd;
    use std::os::fd::AsRawFd;

    let [a, _] = pair.connect();
    pair.turn();
    let mut poll = mio::Poll::new().unwrap();
    let fd = pair.ends[1].as_fd().as_raw_fd();
    poll.registry().register(&mut SourceFd(&fd), mio::Token(0), mio::Interest::READABLE).unwrap();
    let mut events = mio::Events::with_capacity(4);
    for round in 0..20 {
        // Asleep only after poll() has said None once more, as the contract asks.
        pair.ends[1].rest();
        while pair.ends[1].poll().is_some() {}
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        pair.send(0, a.qp, round, b"wake").unwrap();
        pair.ends[0].flush();
        poll.poll(&mut events, Some(Duration::from_secs(5))).unwrap();
        assert!(!events.is_empty(), "round {round}");
        let mut messages = 0;
        while let Some(event) = pair.ends[1].poll() {
            messages += usize::from(matches!(event, Event::Received { .. }));
        }
        assert_eq!(messages, 1);
    }
}

fn soft_pair(crc: bool) -> Pair {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    // One end's wish is enough.
    let a = Soft::new(any, Options { crc }).unwrap();
    let b = Soft::new(any, Options::default()).unwrap();
    Pair::new(a, b)
}

fn loopback_pair() -> Pair {
    let (a, b) = loopback::pair().unwrap();
    Pair::new(a, b)
}

/// Both ends on one device, which this variable names; without it verbs are skipped.
#[cfg(feature = "verbs")]
fn verbs_pair() -> Option<Pair> {
    use vsocket_backend::fabric::verbs::{Verbs, select::Wanted};

    let device = std::env::var("VSOCKET_TEST_VERBS").ok();
    if device.is_none() {
        println!("skipped: VSOCKET_TEST_VERBS names no device");
    }
    let wanted = Wanted { device: Some(device?), ..Wanted::default() };
    Some(Pair::new(Verbs::new(wanted.clone()).unwrap(), Verbs::new(wanted).unwrap()))
}

/// Each case as a test of each fabric.
macro_rules! on_every_fabric {
    ($($case:ident),* $(,)?) => {
        mod soft {
            $(#[test] fn $case() { super::$case(super::soft_pair(false)); })*
        }
        mod soft_with_crc {
            $(#[test] fn $case() { super::$case(super::soft_pair(true)); })*
        }
        #[cfg(feature = "verbs")]
        mod verbs {
            $(#[test] fn $case() {
                if let Some(pair) = super::verbs_pair() {
                    super::$case(pair);
                }
            })*
        }
        mod in_memory {
            $(#[test] fn $case() { super::$case(super::loopback_pair()); })*
        }
    };
}

on_every_fabric! {
    sends_arrive_whole_and_in_order,
    gather_is_joined,
    a_write_is_there_before_the_send_after_it,
    writes_of_all_sizes_land_where_they_should,
    a_wrong_key_ends_the_queue_pair,
    wrong_bounds_end_the_queue_pair,
    a_private_region_cannot_be_written,
    another_domain_cannot_be_written,
    a_region_taken_back_cannot_be_written,
    a_fault_leaves_other_queue_pairs_alone,
    a_fault_is_told_in_the_middle_of_sending,
    local_mistakes_are_refused_at_once,
    a_full_queue_says_so_and_recovers,
    the_death_of_a_peer_flushes_what_is_outstanding,
    close_flushes_and_tells_both,
    a_wrong_secret_is_rejected,
    many_registrations_do_not_mix,
    a_slow_receiver_loses_nothing,
    writes_without_reports_do_not_run_dry,
    a_write_longer_than_any_packet_or_buffer,
    things_may_be_taken_down_in_any_order,
    another_kind_of_fabric_is_refused_by_name,
    queue_pairs_do_not_mix,
    the_descriptor_wakes_a_sleeper,
}
