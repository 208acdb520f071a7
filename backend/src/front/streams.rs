//! The streams of one guest, as its vsock device has them: packets and bytes in, packets, bytes and effects out. No I/O.
//!
//! A stream begins with the guest's `REQUEST` to the vport's port; the shell gives the daemon an end of a socket pair for
//! it ([`Effect::Open`]) and says whether that was possible. *tx* bytes go from the guest to the daemon, *rx* bytes the
//! other way.
//!
//! **Credit.** Each side says how many bytes it can keep (`buf_alloc`) and how many have left it, ever (`fwd_cnt`, modulo
//! 2³²). We keep at most [`BUFFER`] bytes of a stream, and a guest that sends more loses it. What the guest can keep is
//! believed, but never more than that is sent unacknowledged.
//!
//! **Ends.** Half-closes are passed on behind the bytes. When the guest has closed (`SHUTDOWN` both ways), what it sent is
//! still handed over, then it is answered with `RST`, which it waits for. When the daemon has closed, the guest is told
//! `SHUTDOWN`, and answers with `RST` when its program has read everything. A fault on either side is a `RST` at once.
//!
//! **Fairness and bounds.** Streams that have something for the guest stand in a queue, one packet a turn each. What is
//! owed is a set per stream, never a list. Only resets for packets of unknown streams are a list: while it is full, no
//! more packets are taken from the guest ([`Streams::wants_packets`]).
//!
//! The guest is an adversary here: each of its packets is either good for exactly its own stream, or counted by name.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::packet::{HOST, Header, MAX_PAYLOAD, NO_RECEIVE, NO_SEND, STREAM, op};
use crate::metrics::Named;

/// Bytes of one stream that wait for the daemon, at most.
pub const BUFFER: u32 = 64 << 10;
/// Resets that wait for the guest, at most.
const RESETS: usize = 256;
/// Both flags of `SHUTDOWN`.
const BOTH: u32 = NO_RECEIVE | NO_SEND;

/// What the shell has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The guest opens a stream: answer by [`Streams::handle_opened`] or [`Streams::handle_refused`].
    Open {
        /// Its number.
        id: u64,
        /// The guest's port.
        guest_port: u32,
        /// The port it called.
        host_port: u32,
    },
    /// There are bytes for the daemon.
    Write(u64),
    /// The daemon gets no more bytes: shut our end for writing.
    ShutWrite(u64),
    /// The guest takes no more bytes: shut our end for reading.
    ShutRead(u64),
    /// Close our end.
    Close(u64),
}

/// The next thing for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rx {
    /// A packet without payload.
    Packet(Header),
    /// Bytes of this stream's socket, up to so many: read, then say what came of it, with
    /// [`Streams::handle_read`], [`Streams::handle_empty`], [`Streams::handle_end`] or [`Streams::handle_fault`].
    Read {
        /// Which stream.
        id: u64,
        /// Not more than that.
        max: usize,
    },
}

/// How far a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The daemon is being asked.
    Asked,
    /// Bytes go both ways, as far as neither side has shut a direction.
    Open,
    /// The guest has closed: what it sent is handed over, then it gets its `RST`.
    Closing,
    /// Our end is closed, the guest is owed a `RST`.
    Over,
}

/// Which packets a stream owes the guest.
#[derive(Debug, Default, Clone, Copy)]
struct Owed {
    response: bool,
    credit: bool,
    request: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    guest: u32,
    host: u32,
}

#[derive(Debug)]
struct Stream {
    ports: Ports,
    phase: Phase,
    owed: Owed,
    /// It stands in the queue of those that have something for the guest.
    queued: bool,

    /// Bytes for the daemon.
    tx: VecDeque<u8>,
    /// Bytes received from the guest.
    tx_received: u32,
    /// Of them handed over.
    tx_forwarded: u32,
    /// Of them handed over as the guest knows.
    tx_announced: u32,
    /// The guest has said that it sends no more.
    tx_ended: bool,
    /// The daemon has been told so.
    tx_shut: bool,

    /// The socket may have bytes.
    readable: bool,
    /// Bytes sent to the guest.
    rx_sent: u32,
    /// Of them read by its program, as it says.
    rx_forwarded: u32,
    /// What it can keep, as it says.
    rx_room: u32,
    /// It has been asked for credit since it last gave some.
    rx_asked: bool,
    /// The guest takes no more.
    rx_refused: bool,
    /// The daemon sends no more, and all has been read.
    rx_ended: bool,
    /// The daemon takes no more.
    tx_refused: bool,
    /// Which flags of `SHUTDOWN` the guest has been sent.
    told: u32,
}

impl Stream {
    fn new(ports: Ports) -> Self {
        Self {
            ports,
            phase: Phase::Asked,
            owed: Owed::default(),
            queued: false,
            tx: VecDeque::new(),
            tx_received: 0,
            tx_forwarded: 0,
            tx_announced: 0,
            tx_ended: false,
            tx_shut: false,
            readable: false,
            rx_sent: 0,
            rx_forwarded: 0,
            rx_room: 0,
            rx_asked: false,
            rx_refused: false,
            rx_ended: false,
            tx_refused: false,
            told: 0,
        }
    }

    /// How many bytes the guest can take. One that contradicts itself can take none.
    fn credit(&self) -> usize {
        self.rx_room.saturating_sub(self.rx_sent.wrapping_sub(self.rx_forwarded)) as usize
    }

    fn reads(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.rx_ended && !self.rx_refused
    }

    /// The flags of `SHUTDOWN` that hold now.
    fn shut(&self) -> u32 {
        // Who has said its last word and heard the other's has nothing to receive either.
        let deaf = self.tx_refused || (self.tx_shut && self.rx_ended);
        (u32::from(self.rx_ended) * NO_SEND) | (u32::from(deaf) * NO_RECEIVE)
    }

    /// The guest's view of our room is less than half of what it could be.
    fn credit_is_worth_telling(&self) -> bool {
        let used = self.tx_received.wrapping_sub(self.tx_announced);
        self.tx_forwarded != self.tx_announced && used > BUFFER / 2
    }

    fn has_news(&self) -> bool {
        match self.phase {
            Phase::Asked | Phase::Closing => false,
            Phase::Over => true,
            Phase::Open => {
                let Owed { response, credit, request } = self.owed;
                response
                    || credit
                    || request
                    || self.shut() & !self.told != 0
                    || (self.reads() && self.credit() > 0)
            }
        }
    }

    /// A header to the guest; it carries our credit.
    fn header(&mut self, cid: u64, op: u16) -> Header {
        self.tx_announced = self.tx_forwarded;
        self.owed.credit = false;
        Header {
            src_cid: HOST,
            dst_cid: cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: STREAM,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: self.tx_forwarded,
            ..Header::default()
        }
    }

    /// The next packet without payload that it owes.
    fn control(&mut self, cid: u64) -> Option<Header> {
        if self.phase == Phase::Over {
            return Some(self.header(cid, op::RST));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(self.header(cid, op::RESPONSE));
        }
        if self.owed.credit {
            return Some(self.header(cid, op::CREDIT_UPDATE));
        }
        if std::mem::take(&mut self.owed.request) {
            return Some(self.header(cid, op::CREDIT_REQUEST));
        }
        let shut = self.shut();
        if shut & !self.told != 0 {
            self.told |= shut;
            return Some(Header { flags: self.told, ..self.header(cid, op::SHUTDOWN) });
        }
        None
    }

    /// The guest's word on its own buffer.
    fn take_credit(&mut self, header: &Header) {
        let before = self.credit();
        (self.rx_room, self.rx_forwarded) = (header.buf_alloc, header.fwd_cnt);
        if self.credit() > before {
            self.rx_asked = false;
        }
    }

    /// Asks for credit, once, when there may be bytes and none can go.
    fn ask_for_credit(&mut self) {
        if self.reads() && self.credit() == 0 && !self.rx_asked {
            (self.rx_asked, self.owed.request) = (true, true);
        }
    }
}

/// All streams of a guest.
#[derive(Debug)]
pub struct Streams {
    cid: u64,
    port: u32,
    limit: usize,
    by_ports: HashMap<Ports, u64>,
    streams: BTreeMap<u64, Stream>,
    next: u64,
    /// Who has something for the guest, each once.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    /// The last packet was a reset of nobody's: a stream comes next.
    after_reset: bool,
    effects: VecDeque<Effect>,
    /// What was refused, by name.
    pub drops: Named,
}

impl Streams {
    /// For the guest with this CID, whose streams go to this port, and are so many at most.
    pub fn new(cid: u64, port: u32, limit: usize) -> Self {
        Self {
            cid,
            port,
            limit,
            by_ports: HashMap::new(),
            streams: BTreeMap::new(),
            next: 1,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            after_reset: false,
            effects: VecDeque::new(),
            drops: Named::default(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Whether more packets of the guest may be taken now.
    pub fn wants_packets(&self) -> bool {
        self.resets.len() < RESETS
    }

    /// What the shell has to do next.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    // ------------------------------------------------------------ from the guest

    /// A packet of the guest, with all of its payload.
    pub fn handle_packet(&mut self, header: &Header, payload: &[u8]) {
        if header.src_cid != self.cid {
            // Whom would an answer reach?
            return self.drops.count("packet-cid");
        }
        if header.dst_cid != HOST || header.kind != STREAM {
            return self.refuse(header, if header.kind == STREAM { "packet-cid" } else { "packet-type" });
        }
        let ports = Ports { guest: header.src_port, host: header.dst_port };
        match (self.by_ports.get(&ports).copied(), header.op) {
            (None, op::REQUEST) => self.open(header, ports),
            (None, _) => self.refuse(header, "packet-unknown-stream"),
            (Some(id), op::REQUEST) => self.fail(id, "packet-second-request"),
            (Some(id), _) => self.advance(id, header, payload),
        }
    }

    /// A packet whose payload cannot be had.
    pub fn handle_bad_packet(&mut self, header: &Header, name: &'static str) {
        self.drops.count(name);
        let ports = Ports { guest: header.src_port, host: header.dst_port };
        if header.src_cid == self.cid
            && let Some(&id) = self.by_ports.get(&ports)
        {
            self.end(id);
        }
    }

    /// The guest has rebooted or is gone: nobody waits for anything.
    pub fn handle_guest_gone(&mut self) {
        for (id, stream) in std::mem::take(&mut self.streams) {
            if matches!(stream.phase, Phase::Asked | Phase::Open | Phase::Closing) {
                self.effects.push_back(Effect::Close(id));
            }
        }
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Answers a packet that belongs nowhere, unless it is itself such an answer.
    fn refuse(&mut self, header: &Header, name: &'static str) {
        if header.op == op::RST {
            return;
        }
        self.drops.count(name);
        self.resets.push_back(header.reset());
    }

    fn open(&mut self, header: &Header, ports: Ports) {
        if ports.host != self.port {
            return self.refuse(header, "port-closed");
        }
        if self.streams.len() >= self.limit {
            return self.refuse(header, "stream-limit");
        }
        let id = self.next;
        self.next += 1;
        let mut stream = Stream::new(ports);
        stream.take_credit(header);
        self.streams.insert(id, stream);
        self.by_ports.insert(ports, id);
        self.effects.push_back(Effect::Open { id, guest_port: ports.guest, host_port: ports.host });
    }

    fn advance(&mut self, id: u64, header: &Header, payload: &[u8]) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if header.op == op::RST {
            return self.forget(id);
        }
        match (stream.phase, header.op) {
            (Phase::Over, _) => return,
            (Phase::Asked, _) => return self.fail(id, "packet-early"),
            (Phase::Closing, op::RW) => return self.fail(id, "data-after-end"),
            _ => {}
        }
        stream.take_credit(header);
        match header.op {
            op::RW => self.data(id, payload),
            op::SHUTDOWN => self.shutdown(id, header.flags),
            op::CREDIT_REQUEST => {
                stream.owed.credit = true;
                self.touch(id);
            }
            op::CREDIT_UPDATE => self.touch(id),
            _ => self.fail(id, "packet-op"),
        }
    }

    fn data(&mut self, id: u64, payload: &[u8]) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.tx_ended {
            return self.fail(id, "data-after-end");
        }
        let kept = stream.tx_received.wrapping_sub(stream.tx_forwarded);
        if payload.len() > (BUFFER - kept) as usize {
            return self.fail(id, "credit-exceeded");
        }
        stream.tx_received = stream.tx_received.wrapping_add(payload.len() as u32);
        if stream.tx_refused {
            stream.tx_forwarded = stream.tx_received;
        } else if !payload.is_empty() {
            stream.tx.extend(payload);
            self.effects.push_back(Effect::Write(id));
        }
        self.touch(id);
    }

    fn shutdown(&mut self, id: u64, flags: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if flags & BOTH == 0 {
            return self.fail(id, "packet-flags");
        }
        stream.tx_ended |= flags & NO_SEND != 0;
        if flags & NO_RECEIVE != 0 && !stream.rx_refused {
            stream.rx_refused = true;
            self.effects.push_back(Effect::ShutRead(id));
        }
        if stream.tx_ended && stream.rx_refused {
            stream.phase = Phase::Closing;
        }
        self.finish_tx(id);
        self.touch(id);
    }

    // ------------------------------------------------------------ from the daemon

    /// The daemon has the other end.
    pub fn handle_opened(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id).filter(|s| s.phase == Phase::Asked) else { return };
        stream.phase = Phase::Open;
        stream.owed.response = true;
        self.touch(id);
    }

    /// The daemon cannot have it.
    pub fn handle_refused(&mut self, id: u64, name: &'static str) {
        if self.streams.get(&id).is_some_and(|s| s.phase == Phase::Asked) {
            self.fail(id, name);
        }
    }

    /// The daemon is dead: so are its ends of the streams. Those it was never asked about are not touched.
    pub fn handle_daemon_gone(&mut self) {
        let given = |stream: &Stream| matches!(stream.phase, Phase::Open | Phase::Closing);
        let ids: Vec<u64> = self.streams.iter().filter(|(_, s)| given(s)).map(|(&id, _)| id).collect();
        ids.into_iter().for_each(|id| self.end(id));
    }

    /// Everything of this device ends.
    pub fn handle_stop(&mut self) {
        let ids: Vec<u64> = self.streams.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id));
    }

    /// The stream's socket has bytes, or an end.
    pub fn handle_readable(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.readable = true;
            stream.ask_for_credit();
            self.touch(id);
        }
    }

    /// So many bytes were read, of a [`Rx::Read`]: the header they go with.
    pub fn handle_read(&mut self, id: u64, len: usize) -> Header {
        let cid = self.cid;
        let Some(stream) = self.streams.get_mut(&id) else { return Header::default() };
        stream.rx_sent = stream.rx_sent.wrapping_add(len as u32);
        stream.ask_for_credit();
        let header = Header { len: len as u32, ..stream.header(cid, op::RW) };
        self.touch(id);
        header
    }

    /// There was nothing to read: it will be said when there is.
    pub fn handle_empty(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.readable = false;
            self.touch(id);
        }
    }

    /// The daemon will send no more.
    pub fn handle_end(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            (stream.rx_ended, stream.readable) = (true, false);
            self.close_if_done(id);
            self.touch(id);
        }
    }

    /// The socket failed, or the bytes read from it are lost.
    pub fn handle_fault(&mut self, id: u64, name: Option<&'static str>) {
        if let Some(name) = name {
            self.drops.count(name);
        }
        self.end(id);
    }

    /// The daemon will receive no more.
    pub fn handle_deaf(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.tx_refused = true;
        stream.rx_ended |= stream.rx_refused;
        stream.tx.clear();
        stream.tx_forwarded = stream.tx_received;
        self.close_if_done(id);
        self.finish_tx(id);
        self.touch(id);
    }

    /// The bytes for the daemon, in two parts.
    pub fn pending(&self, id: u64) -> (&[u8], &[u8]) {
        self.streams.get(&id).map_or((&[], &[]), |stream| stream.tx.as_slices())
    }

    /// So many of them are handed over.
    pub fn handle_written(&mut self, id: u64, len: usize) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.tx.drain(..len.min(stream.tx.len()));
        stream.tx_forwarded = stream.tx_received.wrapping_sub(stream.tx.len() as u32);
        self.finish_tx(id);
        self.touch(id);
    }

    // ------------------------------------------------------------ to the guest

    /// The next thing for the guest, whose buffer has room for so many bytes of payload.
    pub fn poll_rx(&mut self, room: usize) -> Option<Rx> {
        if (!self.after_reset || self.ready.is_empty())
            && let Some(reset) = self.resets.pop_front()
        {
            self.after_reset = true;
            return Some(Rx::Packet(reset));
        }
        self.after_reset = false;
        while let Some(id) = self.ready.pop_front() {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.queued = false;
            if let Some(header) = stream.control(self.cid) {
                if header.op == op::RST {
                    self.forget(id);
                } else {
                    self.touch(id);
                }
                return Some(Rx::Packet(header));
            }
            let max = stream.credit().min(room).min(MAX_PAYLOAD);
            if stream.reads() && max > 0 {
                return Some(Rx::Read { id, max });
            }
        }
        self.resets.pop_front().map(Rx::Packet)
    }

    // ------------------------------------------------------------ within

    /// Puts it in the queue if it has something for the guest.
    fn touch(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.owed.credit |= stream.credit_is_worth_telling();
        if stream.has_news() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Passes the guest's end on, if its last byte has gone.
    fn finish_tx(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.tx.is_empty() {
            return;
        }
        if stream.phase == Phase::Closing {
            return self.end(id);
        }
        if stream.phase == Phase::Open && stream.tx_ended && !stream.tx_shut {
            stream.tx_shut = true;
            self.effects.push_back(Effect::ShutWrite(id));
        }
    }

    /// Nothing goes through our end any more. The guest's `SHUTDOWN` and `RST` are still to come.
    fn close_if_done(&mut self, id: u64) {
        if self.streams.get(&id).is_some_and(|s| s.rx_ended && s.tx_refused && s.phase == Phase::Open) {
            self.effects.push_back(Effect::Close(id));
        }
    }

    fn fail(&mut self, id: u64, name: &'static str) {
        self.drops.count(name);
        self.end(id);
    }

    /// Ends a stream: the guest is owed a reset.
    fn end(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.phase != Phase::Over {
            stream.phase = Phase::Over;
            stream.tx = VecDeque::new();
            self.effects.push_back(Effect::Close(id));
        }
        self.touch(id);
    }

    /// Nothing more will be said of it.
    fn forget(&mut self, id: u64) {
        let Some(stream) = self.streams.remove(&id) else { return };
        self.by_ports.remove(&stream.ports);
        if stream.phase != Phase::Over {
            self.effects.push_back(Effect::Close(id));
        }
    }
}

#[cfg(test)]
mod tests;
