//! Both ends in one process, without a network: the fabric for tests of what stands on it.
//!
//! Same contract as the others, including faults, back-pressure and the death of an end (dropping it). Made for
//! clarity: every SEND is a small allocation, and both ends share one lock.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::registry::Registry;
use super::{
    Access, Disconnect, DomainId, Endpoint, Error, Event, Fabric, Facts, Fault, Kind, LocalRange, MAX_GATHER,
    MAX_SEND, MAX_WRITE, MemoryKey, PostError, QpId, Region, RemoteAddress, Secret, Signal, Status, WorkId,
};

/// Work requests waiting at one queue pair.
const DEPTH: usize = 256;

/// Events waiting at one end before the other's work has to wait.
const INBOX: usize = 256;

const SETUP: Duration = Duration::from_secs(5);

enum Item {
    Connected(QpId),
    Received(QpId, Vec<u8>),
    Completed(QpId, WorkId, Status),
    Room(QpId),
    Disconnected(QpId, Disconnect),
}

enum Work {
    Send(Vec<u8>),
    Write(Region, LocalRange, RemoteAddress),
}

struct Qp {
    domain: DomainId,
    peer: Option<QpId>,
    deadline: Option<Instant>,
    work: VecDeque<(WorkId, Signal, Work)>,
    refused: bool,
}

struct Side {
    doorbell: OwnedFd,
    registry: Registry,
    domains: HashSet<DomainId>,
    qps: HashMap<QpId, Qp>,
    expected: Vec<(Secret, u32, QpId)>,
    spent: HashSet<Secret>,
    inbox: VecDeque<Item>,
    next: u64,
}

type Hub = [Side; 2];

/// One end.
pub struct Loopback {
    hub: Arc<Mutex<Hub>>,
    own: usize,
    doorbell: OwnedFd,
    current: Vec<u8>,
}

/// Two ends that can dial each other.
pub fn pair() -> Result<(Loopback, Loopback), Error> {
    let (a, bell_a) = Side::new()?;
    let (b, bell_b) = Side::new()?;
    let hub = Arc::new(Mutex::new([a, b]));
    let end = |own, doorbell| Loopback { hub: Arc::clone(&hub), own, doorbell, current: Vec::new() };
    Ok((end(0, bell_a), end(1, bell_b)))
}

impl Side {
    fn new() -> Result<(Self, OwnedFd), Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let doorbell = eventfd(0, flags).map_err(|error| Error::Readiness(error.into()))?;
        let clone = doorbell.try_clone().map_err(Error::Readiness)?;
        let side = Self {
            doorbell,
            registry: Registry::default(),
            domains: HashSet::new(),
            qps: HashMap::new(),
            expected: Vec::new(),
            spent: HashSet::new(),
            inbox: VecDeque::new(),
            next: 1,
        };
        Ok((side, clone))
    }

    fn ring(&self) {
        // A full counter has rung already.
        let _ = rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes());
    }

    fn tell(&mut self, item: Item) {
        self.inbox.push_back(item);
        self.ring();
    }

    fn add(
        &mut self,
        domain: DomainId,
        peer: Option<QpId>,
        deadline: Option<Instant>,
    ) -> Result<QpId, Error> {
        if !self.domains.contains(&domain) {
            return Err(Error::UnknownDomain);
        }
        let id = QpId(self.next);
        self.next += 1;
        self.qps.insert(id, Qp { domain, peer, deadline, work: VecDeque::new(), refused: false });
        Ok(id)
    }

    /// Ends a queue pair here: flushes its work and says why.
    fn end(&mut self, id: QpId, reason: Disconnect) -> Option<QpId> {
        let qp = self.qps.remove(&id)?;
        self.expected.retain(|&(.., expected)| expected != id);
        for (work, ..) in qp.work {
            self.tell(Item::Completed(id, work, Status::Flushed));
        }
        self.tell(Item::Disconnected(id, reason));
        qp.peer
    }
}

/// Carries one queue pair's work over, as far as the other end has room.
fn carry(hub: &mut Hub, own: usize, id: QpId) {
    loop {
        let (here, there) = both(hub, own);
        let Some(qp) = here.qps.get_mut(&id) else { return };
        let Some(peer) = qp.peer.filter(|_| there.inbox.len() < INBOX) else { return };
        let Some((work, signal, what)) = qp.work.pop_front() else { return };
        let has_room = qp.work.len() <= DEPTH / 2;
        let room = has_room && std::mem::take(&mut qp.refused);
        match place(there, peer, what) {
            Ok(()) if signal == Signal::Yes => here.tell(Item::Completed(id, work, Status::Done)),
            Ok(()) => {}
            Err(fault) => {
                here.tell(Item::Completed(id, work, Status::Flushed));
                here.end(id, Disconnect::Terminated(fault));
                there.end(peer, Disconnect::PeerFault(fault));
                return;
            }
        }
        if room {
            here.tell(Item::Room(id));
        }
    }
}

fn place(there: &mut Side, peer: QpId, what: Work) -> Result<(), Fault> {
    match what {
        Work::Send(bytes) => there.tell(Item::Received(peer, bytes)),
        Work::Write(_, LocalRange { len: 0, .. }, _) => {}
        Work::Write(region, local, remote) => {
            let Some(domain) = there.qps.get(&peer).map(|qp| qp.domain) else { return Ok(()) };
            let (target, offset) = there.registry.remote(domain, remote.rkey, remote.address, local.len)?;
            let copied = region.copy_to(local.offset, target, offset, local.len);
            debug_assert!(copied, "both ranges have been checked");
        }
    }
    Ok(())
}

fn both(hub: &mut Hub, own: usize) -> (&mut Side, &mut Side) {
    let [a, b] = hub;
    if own == 0 { (a, b) } else { (b, a) }
}

fn end_both(hub: &mut Hub, own: usize, id: QpId) {
    let (here, there) = both(hub, own);
    if let Some(peer) = here.end(id, Disconnect::Closed) {
        there.end(peer, Disconnect::PeerClosed);
    }
}

impl Loopback {
    /// A test that panicked elsewhere must not hide behind this lock.
    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&mut self, id: QpId, work: WorkId, signal: Signal, what: Work) -> Result<(), PostError> {
        let own = self.own;
        let mut hub = self.lock();
        let qp =
            hub[own].qps.get_mut(&id).filter(|qp| qp.deadline.is_none()).ok_or(PostError::NotConnected)?;
        if qp.work.len() >= DEPTH {
            qp.refused = true;
            return Err(PostError::Full);
        }
        qp.work.push_back((work, signal, what));
        Ok(())
    }
}

impl AsFd for Loopback {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

impl Fabric for Loopback {
    fn kind(&self) -> Kind {
        Kind::Memory
    }

    fn facts(&self) -> Facts {
        let side = &self.lock()[self.own];
        Facts { queue_pairs: side.qps.len(), regions: side.registry.len(), ..Facts::default() }
    }

    fn open_domain(&mut self) -> DomainId {
        let own = self.own;
        let side = &mut self.lock()[own];
        let domain = DomainId(side.next as u32);
        side.next += 1;
        side.domains.insert(domain);
        domain
    }

    fn close_domain(&mut self, domain: DomainId) {
        let own = self.own;
        let mut hub = self.lock();
        let members = hub[own].qps.iter().filter(|(_, qp)| qp.domain == domain);
        let members: Vec<QpId> = members.map(|(&id, _)| id).collect();
        for id in members {
            end_both(&mut hub, own, id);
        }
        hub[own].registry.close_domain(domain);
        hub[own].domains.remove(&domain);
    }

    fn register(&mut self, domain: DomainId, region: Region, access: Access) -> Result<MemoryKey, Error> {
        let own = self.own;
        let side = &mut self.lock()[own];
        if !side.domains.contains(&domain) {
            return Err(Error::UnknownDomain);
        }
        side.registry.register(domain, region, access)
    }

    fn deregister(&mut self, key: MemoryKey) -> Result<(), Error> {
        let own = self.own;
        self.lock()[own].registry.deregister(key)
    }

    fn expect(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        let own = self.own;
        let side = &mut self.lock()[own];
        if !side.spent.insert(secret) {
            return Err(Error::ReusedSecret);
        }
        let id = side.add(domain, None, Some(now + SETUP))?;
        side.expected.push((secret, vni, id));
        Ok((id, Endpoint::new(Kind::Memory, &[])))
    }

    fn dial(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        offer: &Endpoint,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        if offer.kind() != Some(Kind::Memory) {
            return Err(Error::WrongKind { theirs: offer.kind_name(), ours: Kind::Memory.name() });
        }
        let own = self.own;
        let mut hub = self.lock();
        let (here, there) = both(&mut hub, own);
        let id = here.add(domain, None, Some(now + SETUP))?;
        let found = there.expected.iter().position(|&(other, for_vni, _)| other == secret && for_vni == vni);
        let Some(at) = found else {
            here.end(id, Disconnect::Rejected);
            return Ok((id, *offer));
        };
        let (.., peer) = there.expected.swap_remove(at);
        for (side, id, peer) in [(here, id, peer), (there, peer, id)] {
            if let Some(qp) = side.qps.get_mut(&id) {
                (qp.peer, qp.deadline) = (Some(peer), None);
                side.tell(Item::Connected(id));
            }
        }
        Ok((id, *offer))
    }

    /// Dialling has joined both ends already.
    fn accept(&mut self, _qp: QpId, _answer: &Endpoint) -> Result<(), Error> {
        Ok(())
    }

    fn close(&mut self, qp: QpId) {
        let own = self.own;
        end_both(&mut self.lock(), own, qp);
    }

    fn post_send(
        &mut self,
        qp: QpId,
        work: WorkId,
        gather: &[&[u8]],
        signal: Signal,
    ) -> Result<(), PostError> {
        let bytes = gather.concat();
        if gather.len() > MAX_GATHER || bytes.len() > MAX_SEND {
            return Err(PostError::TooLong);
        }
        self.post(qp, work, signal, Work::Send(bytes))
    }

    fn post_write(
        &mut self,
        qp: QpId,
        work: WorkId,
        local: LocalRange,
        remote: RemoteAddress,
        signal: Signal,
    ) -> Result<(), PostError> {
        let region = {
            let hub = self.lock();
            let side = &hub[self.own];
            let domain = side.qps.get(&qp).ok_or(PostError::NotConnected)?.domain;
            side.registry.local(domain, local)?.clone()
        };
        if local.len > MAX_WRITE {
            return Err(PostError::TooLong);
        }
        self.post(qp, work, signal, Work::Write(region, local, remote))
    }

    fn flush(&mut self) {
        let own = self.own;
        let mut hub = self.lock();
        let busy = hub[own].qps.iter().filter(|(_, qp)| !qp.work.is_empty());
        let busy: Vec<QpId> = busy.map(|(&id, _)| id).collect();
        for id in busy {
            carry(&mut hub, own, id);
        }
    }

    fn poll(&mut self) -> Option<Event<'_>> {
        let _ = rustix::io::read(&self.doorbell, &mut [0; 8]);
        // What had to wait for room at the other end.
        self.flush();
        let own = self.own;
        let item = {
            let mut hub = self.lock();
            let item = hub[own].inbox.pop_front();
            let (here, there) = both(&mut hub, own);
            if !here.inbox.is_empty() {
                here.ring();
            }
            if there.qps.values().any(|qp| !qp.work.is_empty()) {
                there.ring();
            }
            item?
        };
        Some(match item {
            Item::Connected(qp) => Event::Connected { qp },
            Item::Received(qp, payload) => {
                self.current = payload;
                Event::Received { qp, payload: &self.current }
            }
            Item::Completed(qp, work, status) => Event::Completed { qp, work, status },
            Item::Room(qp) => Event::Room { qp },
            Item::Disconnected(qp, reason) => Event::Disconnected { qp, reason },
        })
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.lock()[self.own].qps.values().filter_map(|qp| qp.deadline).min()
    }

    fn handle_timeout(&mut self, now: Instant) {
        let own = self.own;
        let side = &mut self.lock()[own];
        let late = side.qps.iter().filter(|(_, qp)| qp.deadline.is_some_and(|deadline| deadline <= now));
        let late: Vec<QpId> = late.map(|(&id, _)| id).collect();
        for id in late {
            side.end(id, Disconnect::TimedOut);
        }
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        let own = self.own;
        let mut hub = self.lock();
        let (here, there) = both(&mut hub, own);
        here.expected.clear();
        let peers: Vec<QpId> = here.qps.drain().filter_map(|(_, qp)| qp.peer).collect();
        for peer in peers {
            there.end(peer, Disconnect::PeerClosed);
        }
    }
}
