//! Verbs in user space over kernel TCP, in the wire format of the RDDP family (RFC 5044, 5041, 5040).
//!
//! The fabric for hosts without an RNIC: it needs no device and no module, and does not pretend to be RDMA. One
//! TCP connection is one queue pair.
//!
//! | file | what it does | I/O |
//! |---|---|---|
//! | [`mpa`], [`ddp`], [`rdmap`] | the three layers' formats | no |
//! | [`tx`] | work requests → stream; payload goes from its region to the kernel uncopied | one gathering send |
//! | [`rx`] | stream → placed bytes and messages; payload goes from the kernel to its region uncopied | one read |
//! | [`listener`] | strangers and secrets | reads one frame |
//! | [`qp`] | one connection's life | yes |
//! | `door` | who is let in from the listening socket | yes |
//! | this | all of them: readiness, events, deadlines | yes |
//!
//! The first FPDU after the start-up frames is the dialler's, a WRITE of no bytes: RFC 5044 lets the listener send only
//! after that.

#![forbid(unsafe_code)]

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Poll, Token};

use self::listener::{Ledger, Stranger};
use self::mpa::Binding;
use self::qp::{Outcome, Phase, Qp};
use super::registry::Registry;
use super::{
    Access, Disconnect, DomainId, Endpoint, Error, Event, Fabric, Facts, Kind, LocalRange, MemoryKey,
    PostError, QpId, Refusal, Region, RemoteAddress, Secret, Signal, Status, WorkId,
};

pub mod ddp;
mod door;
pub mod listener;
pub mod mpa;
pub mod qp;
pub mod rdmap;
pub mod rx;
pub mod tx;

/// A dialled or expected queue pair must be connected by then: both ends have just agreed on it.
const SETUP: Duration = Duration::from_secs(5);

const LISTENER: Token = Token(usize::MAX);
const STRANGERS: usize = usize::MAX / 2;

/// What may be chosen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Ask for CRC32c on every segment. Off by default: TCP has its checksum, and with CRC on each payload is copied
    /// once more at each end. On if either end asks.
    pub crc: bool,
}

struct Slot {
    generation: u32,
    qp: Option<Box<Qp>>,
}

/// An event that borrows nothing.
enum Happened {
    Connected(QpId),
    Completed(QpId, WorkId, Status),
    Room(QpId),
    Disconnected(QpId, Disconnect),
    Refused(SocketAddr, Refusal),
}

/// An event in the making: borrowing is left to the end.
enum Found {
    Happened(Happened),
    Message(usize, Range<usize>),
    Assembled(usize),
}

/// See the module.
pub struct Soft {
    options: Options,
    address: SocketAddr,
    listener: TcpListener,
    poll: Poll,
    events: mio::Events,
    seen: Vec<Seen>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    strangers: Vec<Option<Stranger<TcpStream>>>,
    ledger: Ledger,
    registry: Registry,
    domains: HashSet<DomainId>,
    next_domain: u32,
    happened: VecDeque<Happened>,
    ready: VecDeque<usize>,
    dirty: Vec<usize>,
    refused: [u64; Refusal::ALL.len()],
}

#[derive(Clone, Copy)]
struct Seen {
    token: Token,
    readable: bool,
    writable: bool,
    closing: bool,
}

impl Soft {
    /// Listens at `address`; with port 0 the system chooses one, which [`Soft::address`] tells.
    pub fn new(address: SocketAddr, options: Options) -> Result<Self, Error> {
        let listen = |source| Error::Listen { address, source };
        let mut listener = TcpListener::bind(address).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let poll = Poll::new().map_err(Error::Readiness)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).map_err(Error::Readiness)?;
        Ok(Self {
            options,
            address,
            listener,
            poll,
            events: mio::Events::with_capacity(256),
            seen: Vec::with_capacity(256),
            slots: Vec::new(),
            free: Vec::new(),
            strangers: Vec::new(),
            ledger: Ledger::default(),
            registry: Registry::default(),
            domains: HashSet::new(),
            next_domain: 1,
            happened: VecDeque::new(),
            ready: VecDeque::new(),
            dirty: Vec::new(),
            refused: [0; Refusal::ALL.len()],
        })
    }

    /// Where peers dial this fabric.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many strangers were turned away for this reason.
    pub fn refused(&self, reason: Refusal) -> u64 {
        self.refused[reason as usize]
    }

    fn index(&self, qp: QpId) -> Option<usize> {
        let (generation, index) = ((qp.0 >> 32) as u32, (qp.0 & 0xffff_ffff) as usize);
        self.slots.get(index).filter(|slot| slot.generation == generation && slot.qp.is_some()).map(|_| index)
    }

    fn open_qp(&mut self, id: QpId) -> Result<(usize, &mut Qp), PostError> {
        let index = self.index(id).ok_or(PostError::NotConnected)?;
        let qp = self.slots[index].qp.as_mut().filter(|qp| qp.is_open());
        Ok((index, qp.ok_or(PostError::NotConnected)?))
    }

    fn insert(&mut self, domain: DomainId, phase: Phase, now: Instant) -> Result<usize, Error> {
        if !self.domains.contains(&domain) {
            return Err(Error::UnknownDomain);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, qp: None });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.generation = slot.generation.wrapping_add(1);
        let id = QpId(u64::from(slot.generation) << 32 | index as u64);
        slot.qp = Some(Box::new(Qp::new(id, domain, phase, now + SETUP, self.options.crc)));
        Ok(index)
    }

    /// Forgets a queue pair and closes its connection.
    fn remove(&mut self, index: usize) {
        self.ledger.forget(index);
        let Some(mut qp) = self.slots[index].qp.take() else { return };
        self.ready.retain(|&other| other != index);
        self.dirty.retain(|&other| other != index);
        if let Some(stream) = qp.stream() {
            let _ = self.poll.registry().deregister(stream);
        }
        self.free.push(index);
    }

    fn watch(&mut self, index: usize) -> io::Result<()> {
        let Some(stream) = self.slots[index].qp.as_mut().and_then(|qp| qp.stream()) else { return Ok(()) };
        self.poll.registry().register(stream, Token(index), Interest::READABLE | Interest::WRITABLE)
    }

    fn queue_read(&mut self, index: usize) {
        if let Some(qp) = &mut self.slots[index].qp
            && !qp.queued
        {
            qp.queued = true;
            self.ready.push_back(index);
        }
    }

    /// Sends, and reports what that completed.
    fn transmit(&mut self, index: usize) {
        let Some(qp) = &mut self.slots[index].qp else { return };
        let result = qp.transmit();
        report_done(qp, &mut self.happened);
        if qp.is_open() && qp.tx.take_room() {
            self.happened.push_back(Happened::Room(qp.id));
        }
        match result {
            Err(reason) => self.fail(index, reason),
            Ok(()) if qp.is_readable() => self.queue_read(index),
            Ok(()) => {}
        }
    }

    /// Ends a queue pair for its owner.
    fn settle(&mut self, index: usize, reason: Disconnect) {
        let Some(qp) = &mut self.slots[index].qp else { return };
        report_done(qp, &mut self.happened);
        for work in qp.tx.abandon() {
            self.happened.push_back(Happened::Completed(qp.id, work, Status::Flushed));
        }
        if !matches!(qp.phase, Phase::Leaving) {
            self.happened.push_back(Happened::Disconnected(qp.id, reason));
        }
    }

    fn fail(&mut self, index: usize, reason: Disconnect) {
        self.settle(index, reason);
        self.remove(index);
    }

    /// One turn of reading at the head of the ready list.
    fn read(&mut self, index: usize) -> Option<Found> {
        let Some(qp) = &mut self.slots[index].qp else {
            self.ready.pop_front();
            return None;
        };
        match qp.read(&self.registry) {
            Outcome::Message(range) => return Some(Found::Message(index, range)),
            Outcome::Assembled => return Some(Found::Assembled(index)),
            // Others first: what is left here is looked at again in its turn.
            Outcome::Yield => self.ready.rotate_left(1),
            Outcome::Nothing => {
                qp.queued = false;
                self.ready.pop_front();
            }
            Outcome::Connected => {
                self.happened.push_back(Happened::Connected(qp.id));
                self.transmit(index);
            }
            Outcome::Over(reason) => self.fail(index, reason),
            Outcome::Left => self.remove(index),
            Outcome::Fault(fault, len, quote, quoted) => {
                self.settle(index, Disconnect::PeerFault(fault));
                if let Some(qp) = &mut self.slots[index].qp {
                    qp.leave(fault, len, &quote[..quoted], Instant::now());
                }
            }
        }
        None
    }

    /// Asks the operating system what is ready; false if nothing is.
    fn ask(&mut self) -> bool {
        // An interrupted wait is asked again by the caller's loop; other errors are bugs of ours, and look like quiet.
        if self.poll.poll(&mut self.events, Some(Duration::ZERO)).is_err() {
            return false;
        }
        self.seen.clear();
        self.seen.extend(self.events.iter().map(|event| Seen {
            token: event.token(),
            readable: event.is_readable(),
            writable: event.is_writable(),
            closing: event.is_read_closed() || event.is_error(),
        }));
        for at in 0..self.seen.len() {
            self.notice(self.seen[at]);
        }
        !self.seen.is_empty()
    }

    fn notice(&mut self, seen: Seen) {
        match seen.token {
            LISTENER => self.accept(),
            Token(token) if token >= STRANGERS => self.hear(token - STRANGERS),
            Token(index) => {
                let Some(qp) = self.slots.get_mut(index).and_then(|slot| slot.qp.as_mut()) else { return };
                if seen.readable || seen.closing {
                    qp.set_readable(seen.closing);
                }
                let written = if seen.writable { qp.set_writable(self.options.crc) } else { Ok(()) };
                match written {
                    Err(reason) => self.fail(index, reason),
                    Ok(()) => {
                        self.transmit(index);
                        self.queue_read(index);
                    }
                }
            }
        }
    }
}

fn report_done(qp: &mut Qp, happened: &mut VecDeque<Happened>) {
    while let Some((work, signal)) = qp.tx.poll_done() {
        if signal == Signal::Yes {
            happened.push_back(Happened::Completed(qp.id, work, Status::Done));
        }
    }
}

impl AsFd for Soft {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.registry().as_fd()
    }
}

impl Fabric for Soft {
    fn kind(&self) -> Kind {
        Kind::Soft
    }

    fn facts(&self) -> Facts {
        let queue_pairs = self.slots.iter().filter(|slot| slot.qp.is_some()).count();
        Facts { queue_pairs, regions: self.registry.len(), ..Facts::default() }
    }

    fn open_domain(&mut self) -> DomainId {
        let domain = DomainId(self.next_domain);
        self.next_domain += 1;
        self.domains.insert(domain);
        domain
    }

    fn close_domain(&mut self, domain: DomainId) {
        let in_domain = |slot: &Slot| slot.qp.as_ref().filter(|qp| qp.domain == domain).map(|qp| qp.id);
        let ids: Vec<QpId> = self.slots.iter().filter_map(in_domain).collect();
        for id in ids {
            self.close(id);
        }
        self.registry.close_domain(domain);
        self.domains.remove(&domain);
    }

    fn register(&mut self, domain: DomainId, region: Region, access: Access) -> Result<MemoryKey, Error> {
        if !self.domains.contains(&domain) {
            return Err(Error::UnknownDomain);
        }
        self.registry.register(domain, region, access)
    }

    fn deregister(&mut self, key: MemoryKey) -> Result<(), Error> {
        self.registry.deregister(key)
    }

    fn expect(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        let index = self.insert(domain, Phase::Expected, now)?;
        if !self.ledger.expect(secret, vni, index) {
            self.remove(index);
            return Err(Error::ReusedSecret);
        }
        let id = self.slots[index].qp.as_ref().map(|qp| qp.id).expect("just inserted");
        Ok((id, Endpoint::of_address(self.address)))
    }

    fn dial(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        offer: &Endpoint,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        if offer.kind() != Some(Kind::Soft) {
            return Err(Error::WrongKind { theirs: offer.kind_name(), ours: Kind::Soft.name() });
        }
        let address = offer.address().ok_or(Error::BadEndpoint("no socket address"))?;
        let dial = |source| Error::Dial { address, source };
        let index = self.insert(domain, Phase::Connecting(Binding { vni, secret }), now)?;
        let attached = TcpStream::connect(address).and_then(|stream| {
            self.slots[index].qp.as_mut().expect("just inserted").attach(stream);
            self.watch(index)
        });
        if let Err(error) = attached {
            self.remove(index);
            return Err(dial(error));
        }
        let id = self.slots[index].qp.as_ref().map(|qp| qp.id).expect("just inserted");
        Ok((id, Endpoint::of_address(self.address)))
    }

    /// TCP itself brings the dialler: nothing is left to do.
    fn accept(&mut self, _qp: QpId, _answer: &Endpoint) -> Result<(), Error> {
        Ok(())
    }

    fn close(&mut self, qp: QpId) {
        if let Some(index) = self.index(qp) {
            self.fail(index, Disconnect::Closed);
        }
    }

    fn post_send(
        &mut self,
        qp: QpId,
        work: WorkId,
        gather: &[&[u8]],
        signal: Signal,
    ) -> Result<(), PostError> {
        let (index, qp) = self.open_qp(qp)?;
        qp.tx.post_send(work, gather, signal)?;
        if !std::mem::replace(&mut qp.dirty, true) {
            self.dirty.push(index);
        }
        Ok(())
    }

    fn post_write(
        &mut self,
        qp: QpId,
        work: WorkId,
        local: LocalRange,
        remote: RemoteAddress,
        signal: Signal,
    ) -> Result<(), PostError> {
        let index = self.index(qp).ok_or(PostError::NotConnected)?;
        let qp = self.slots[index].qp.as_mut().filter(|qp| qp.is_open()).ok_or(PostError::NotConnected)?;
        let region = self.registry.local(qp.domain, local)?;
        qp.tx.post_write(work, region, local, remote, signal)?;
        if !std::mem::replace(&mut qp.dirty, true) {
            self.dirty.push(index);
        }
        Ok(())
    }

    fn flush(&mut self) {
        while let Some(index) = self.dirty.pop() {
            if let Some(qp) = &mut self.slots[index].qp {
                qp.dirty = false;
            }
            self.transmit(index);
        }
    }

    fn poll(&mut self) -> Option<Event<'_>> {
        let found = loop {
            if let Some(happened) = self.happened.pop_front() {
                break Found::Happened(happened);
            }
            match self.ready.front().copied() {
                Some(index) => {
                    if let Some(found) = self.read(index) {
                        break found;
                    }
                }
                None if self.ask() => {}
                None => return None,
            }
        };
        Some(match found {
            Found::Happened(Happened::Connected(qp)) => Event::Connected { qp },
            Found::Happened(Happened::Completed(qp, work, status)) => Event::Completed { qp, work, status },
            Found::Happened(Happened::Room(qp)) => Event::Room { qp },
            Found::Happened(Happened::Disconnected(qp, reason)) => Event::Disconnected { qp, reason },
            Found::Happened(Happened::Refused(from, reason)) => Event::Refused { from, reason },
            Found::Message(index, range) => {
                let qp = self.slots[index].qp.as_ref().expect("it has just been read");
                Event::Received { qp: qp.id, payload: &qp.staging()[range] }
            }
            Found::Assembled(index) => {
                let qp = self.slots[index].qp.as_ref().expect("it has just been read");
                Event::Received { qp: qp.id, payload: qp.assembled() }
            }
        })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let strangers = self.strangers.iter().flatten().map(|stranger| stranger.deadline);
        let qps = self.slots.iter().filter_map(|slot| slot.qp.as_ref()?.deadline);
        strangers.chain(qps).min()
    }

    fn handle_timeout(&mut self, now: Instant) {
        for at in 0..self.strangers.len() {
            if self.strangers[at].as_ref().is_some_and(|stranger| stranger.deadline <= now) {
                self.refuse(at, Refusal::TimedOut);
            }
        }
        for index in 0..self.slots.len() {
            let late = |qp: &Qp| qp.deadline.is_some_and(|deadline| deadline <= now);
            if self.slots[index].qp.as_deref().is_some_and(late) {
                self.fail(index, Disconnect::TimedOut);
            }
        }
    }
}
