//! One queue pair's life: what is posted and not yet done, what is received, and how it gets to know its peer.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::completion::{Completion, Cq};
use super::connect::{Address, Role, Tag, greeting, is_greeting};
use super::device::Limits;
use super::memory::{Buffer, Mr, Pd};
use super::queue_pair::{QueuePair, Request, Way};
use super::receive::Receives;
use super::ring::Ring;
use crate::fabric::{
    Disconnect, DomainId, LocalRange, MAX_GATHER, MAX_SEND, MAX_WRITE, PostError, QpId, RemoteAddress,
    Secret, Signal, WorkId,
};

/// Work requests under way at one queue pair, if the device allows so many.
const SENDS: u32 = 256;

/// Messages under way are here; behind them, one line for the farewell, which must never lack room.
const SEND_BYTES: usize = 1 << 20;

/// Kept free for the greeting and the farewell.
const RESERVE: u64 = 2;

/// One request in so many is reported, whoever posted it: without reports nothing is ever known to be done.
const EVERY: u32 = 16;

/// Marks the numbers of receive requests.
pub const RECEIVE: u64 = 1 << 63;

/// Where a queue pair stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The answer to its offer has not come.
    Expected,
    /// We expect, and have greeted.
    Greeted,
    /// We have dialled, and wait for the greeting.
    Listening,
    /// We have dialled and greeted back with the request of this number.
    Confirming(u64),
    /// Connected.
    Open,
    /// Over for its owner; the farewell has this number.
    Leaving(u64),
}

/// Something posted and not known to be done.
struct Posted {
    /// The number of its last request.
    last: u64,
    /// Whose it is and whether success is told; `None` for our own messages.
    work: Option<(WorkId, Signal)>,
    /// What its end gives back to the ring.
    upto: Option<u64>,
    /// Keeps the memory of a WRITE.
    mr: Option<Arc<Mr>>,
}

/// What a received message means.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing to tell anybody.
    Nothing,
    /// It is connected now.
    Connected,
    /// A message for the owner, who may have to be told first that it is connected.
    Message {
        /// Whether this is news.
        connected: bool,
    },
    /// It is over.
    Over(Disconnect),
}

/// See the module.
pub struct Link {
    /// Its name.
    pub id: QpId,
    /// Its protection domain.
    pub domain: DomainId,
    /// Where it stands.
    pub phase: Phase,
    /// When it must have got on.
    pub deadline: Option<Instant>,
    /// Posted to since the last flush.
    pub dirty: bool,
    /// Its next completion wakes a sleeper.
    pub armed: bool,
    // The queue pair goes before what it uses.
    qp: QueuePair,
    pub(super) receives: Receives,
    buffer: Mr,
    ring: Ring,
    posted: VecDeque<Posted>,
    requests: Vec<Request>,
    next: u64,
    done: u64,
    quiet: u32,
    refused: bool,
    way: Way,
    psn: u32,
    max_message: usize,
    vni: u32,
    secret: Secret,
}

/// What a new link is for.
pub struct Purpose {
    /// Its name.
    pub id: QpId,
    /// Its domain's number.
    pub domain: DomainId,
    /// Its tenant.
    pub vni: u32,
    /// What both ends know.
    pub secret: Secret,
    /// By when it must be connected.
    pub deadline: Instant,
}

/// How many requests each way a device allows.
pub fn depths(limits: &Limits) -> (u32, u32) {
    let sends = SENDS.min(limits.max_qp_wr).min(limits.max_cqe / 2).max(8);
    (sends, super::receive::SLOTS.min(limits.max_qp_wr).min(limits.max_cqe / 2).max(8))
}

impl Link {
    /// A queue pair that can receive, and has no peer yet.
    pub fn new(
        purpose: Purpose,
        pd: &Arc<Pd>,
        cq: Arc<Cq>,
        depths: (u32, u32),
        way: Way,
        max_message: u32,
    ) -> io::Result<Self> {
        let buffer = Mr::of_buffer(pd, Buffer::new(SEND_BYTES + 64))?;
        let mut receives = Receives::new(pd, depths.1)?;
        let mut qp = QueuePair::new(pd, cq, depths.0, depths.1)?;
        qp.init(way)?;
        receives.post_all(&mut qp)?;
        let mut psn = [0; 4];
        getrandom::fill(&mut psn).map_err(io::Error::other)?;
        let Purpose { id, domain, vni, secret, deadline } = purpose;
        Ok(Self {
            id,
            domain,
            phase: Phase::Expected,
            deadline: Some(deadline),
            dirty: false,
            armed: false,
            qp,
            receives,
            buffer,
            ring: Ring::new(SEND_BYTES),
            posted: VecDeque::new(),
            requests: Vec::new(),
            next: 0,
            done: 0,
            quiet: 0,
            refused: false,
            way,
            psn: u32::from_be_bytes(psn) & 0xff_ffff,
            max_message: max_message as usize,
            vni,
            secret,
        })
    }

    /// Where the peer finds it.
    pub fn address(&self, gid: [u8; 16], lid: u16) -> Address {
        Address { qpn: self.qp.number(), psn: self.psn, gid, lid, mtu: self.way.mtu }
    }

    /// What tells it in a device's reports.
    pub fn token(&self) -> usize {
        self.qp.token()
    }

    /// Its completion queue.
    pub fn completions(&self) -> &Cq {
        self.qp.completions()
    }

    /// Whether work may be posted.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether its owner still knows it.
    pub fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Leaving(_))
    }

    /// The dialler: the peer is there, and will greet.
    pub fn dial(&mut self, peer: &Address) -> io::Result<()> {
        self.phase = Phase::Listening;
        self.qp.connect(self.way, self.psn, peer)
    }

    /// The expecting end: the dialler is there, and is greeted.
    pub fn accept(&mut self, peer: &Address) -> io::Result<()> {
        self.qp.connect(self.way, self.psn, peer)?;
        self.phase = Phase::Greeted;
        self.say(&greeting(Role::Expects, self.vni, &self.secret)).map(|_| ())
    }

    /// Sends a message of our own, at once; its number.
    fn say(&mut self, message: &[u8]) -> io::Result<u64> {
        let Some((offset, upto)) = self.ring.take(message.len()) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        self.put(offset, &[message]);
        let last =
            self.push(self.buffer.base() + offset as u64, self.buffer.lkey(), message.len(), None, true);
        self.posted.push_back(Posted { last, work: None, upto: Some(upto), mr: None });
        self.flush()?;
        Ok(last)
    }

    fn put(&self, offset: usize, pieces: &[&[u8]]) {
        let mut at = offset;
        for piece in pieces {
            if let Some(buffer) = self.buffer.buffer() {
                buffer.copy_in(at, piece);
            }
            at += piece.len();
        }
    }

    fn push(&mut self, at: u64, lkey: u32, len: usize, to: Option<(u64, u32)>, signal: bool) -> u64 {
        let id = self.next;
        self.next += 1;
        self.quiet += 1;
        let signal = signal || self.quiet >= EVERY.min(self.qp.depth() / 4).max(1);
        if signal {
            self.quiet = 0;
        }
        self.requests.push(Request { id, from: (at, lkey), len: len as u32, to, signal });
        id
    }

    fn has_room(&self, requests: u64) -> bool {
        self.next - self.done + requests + RESERVE <= u64::from(self.qp.depth())
    }

    /// Takes a message, copied.
    pub fn post_send(&mut self, work: WorkId, gather: &[&[u8]], signal: Signal) -> Result<(), PostError> {
        let len: usize = gather.iter().map(|piece| piece.len()).sum();
        if gather.len() > MAX_GATHER || len > MAX_SEND {
            return Err(PostError::TooLong);
        }
        let place = if self.has_room(1) { self.ring.take(1 + len) } else { None };
        let Some((offset, upto)) = place else {
            self.refused = true;
            return Err(PostError::Full);
        };
        self.put(offset, &[&[Tag::Data as u8]]);
        self.put(offset + 1, gather);
        let at = self.buffer.base() + offset as u64;
        let last = self.push(at, self.buffer.lkey(), 1 + len, None, signal == Signal::Yes);
        self.posted.push_back(Posted { last, work: Some((work, signal)), upto: Some(upto), mr: None });
        Ok(())
    }

    /// Takes a write, in as many pieces as the device needs.
    pub fn post_write(
        &mut self,
        work: WorkId,
        mr: &Arc<Mr>,
        local: LocalRange,
        remote: RemoteAddress,
        signal: Signal,
    ) -> Result<(), PostError> {
        if local.len > MAX_WRITE {
            return Err(PostError::TooLong);
        }
        let pieces = local.len.div_ceil(self.max_message).max(1) as u64;
        if pieces + RESERVE > u64::from(self.qp.depth()) {
            return Err(PostError::TooLong);
        }
        if !self.has_room(pieces) {
            self.refused = true;
            return Err(PostError::Full);
        }
        let (mut offset, mut last) = (0, 0);
        for piece in 1..=pieces {
            let len = (local.len - offset).min(self.max_message);
            let at = mr.base() + (local.offset + offset) as u64;
            let to = (remote.address.wrapping_add(offset as u64), remote.rkey);
            last = self.push(at, mr.lkey(), len, Some(to), piece == pieces && signal == Signal::Yes);
            offset += len;
        }
        self.posted.push_back(Posted { last, work: Some((work, signal)), upto: None, mr: Some(mr.clone()) });
        Ok(())
    }

    /// Hands to the device what was posted.
    pub fn flush(&mut self) -> io::Result<()> {
        // Memory that is written from is known to be free again as soon as can be; a report per batch is nothing there.
        if self.requests.iter().any(|request| request.to.is_some())
            && let Some(last) = self.requests.last_mut()
        {
            last.signal = true;
            self.quiet = 0;
        }
        let result = self.qp.post(&self.requests);
        self.requests.clear();
        result
    }

    /// A send queue's completion, a good one: what is done now, in order.
    pub fn sent(&mut self, completion: &Completion, mut done: impl FnMut(WorkId, Signal)) {
        self.done = self.done.max(completion.id + 1);
        while let Some(posted) = self.posted.front() {
            if posted.last >= self.done {
                break;
            }
            if let Some(upto) = posted.upto {
                self.ring.release(upto);
            }
            if let Some((work, signal)) = posted.work {
                done(work, signal);
            }
            self.posted.pop_front();
        }
    }

    /// Whether a poster that was refused is to be told of room.
    pub fn take_room(&mut self) -> bool {
        let roomy = (self.next - self.done) * 2 <= u64::from(self.qp.depth()) && self.ring.is_roomy();
        roomy && std::mem::take(&mut self.refused)
    }

    /// Everything that is not known to be done, in order. The link is over.
    pub fn abandon(&mut self) -> Vec<WorkId> {
        self.requests.clear();
        self.posted.drain(..).filter_map(|posted| posted.work).map(|(work, _)| work).collect()
    }

    /// Whether its end may be told to the peer through the queue pair: not while the device still reads memory that is
    /// not our own, for then the queue pair must go at once.
    pub fn may_leave(&self) -> bool {
        let unsent = self.requests.first().map_or(self.next, |first| first.id);
        self.is_open() && self.posted.iter().all(|posted| posted.mr.is_none() || posted.last >= unsent)
    }

    /// Says farewell, after [`abandon`](Self::abandon). The queue pair then lives until it is heard, or not in time.
    pub fn leave(&mut self, deadline: Instant) -> io::Result<()> {
        self.put(SEND_BYTES, &[&[Tag::Farewell as u8]]);
        let last = self.push(self.buffer.base() + SEND_BYTES as u64, self.buffer.lkey(), 1, None, true);
        self.phase = Phase::Leaving(last);
        self.deadline = Some(deadline);
        self.flush()
    }

    /// What a received message means, which lies in this slot.
    pub fn hear(&mut self, slot: u32, len: usize) -> io::Result<Heard> {
        let message = self.receives.message(slot, len);
        let is_from = |role| is_greeting(message, role, self.vni, &self.secret);
        Ok(match (self.phase, Tag::of(message)) {
            (Phase::Leaving(_), _) => Heard::Nothing,
            (Phase::Open, Some(Tag::Data)) => Heard::Message { connected: false },
            (Phase::Confirming(_), Some(Tag::Data)) => {
                self.open();
                Heard::Message { connected: true }
            }
            (Phase::Greeted, Some(Tag::Greeting)) if is_from(Role::Dials) => {
                self.open();
                Heard::Connected
            }
            (Phase::Listening, Some(Tag::Greeting)) if is_from(Role::Expects) => {
                let last = self.say(&greeting(Role::Dials, self.vni, &self.secret))?;
                self.phase = Phase::Confirming(last);
                Heard::Nothing
            }
            (Phase::Open | Phase::Confirming(_), Some(Tag::Farewell)) => Heard::Over(Disconnect::PeerClosed),
            (Phase::Open, _) => Heard::Over(Disconnect::Malformed("a message of no known kind")),
            _ => Heard::Over(Disconnect::Rejected),
        })
    }

    /// Whether our greeting has just been acknowledged.
    pub fn confirmed(&mut self) -> bool {
        let confirmed = matches!(self.phase, Phase::Confirming(last) if last < self.done);
        if confirmed {
            self.open();
        }
        confirmed
    }

    /// Whether our farewell has been heard.
    pub fn has_left(&self) -> bool {
        matches!(self.phase, Phase::Leaving(last) if last < self.done)
    }

    fn open(&mut self) {
        self.phase = Phase::Open;
        self.deadline = None;
    }

    /// Gives a slot back to the device.
    pub fn give_back(&mut self, slot: u32) -> io::Result<()> {
        self.receives.post(&mut self.qp, slot)
    }
}
