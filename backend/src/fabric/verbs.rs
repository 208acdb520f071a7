//! Verbs on an RDMA device, through libibverbs.
//!
//! | file | what it does | unsafe |
//! |---|---|---|
//! | [`select`] | which device, port and GID | no |
//! | [`device`] | an open device, its limits and reports | yes |
//! | [`memory`] | protection domains, registrations, buffers | yes |
//! | [`completion`] | completion queues and their channel | yes |
//! | [`queue_pair`] | one queue pair's states and posting | yes |
//! | [`receive`] | the slots that messages arrive in | yes |
//! | [`ring`] | room in the send buffer | no |
//! | [`connect`] | addresses, greeting, farewell | no |
//! | [`link`] | one queue pair's life | no |
//! | [`station`] | the device as this fabric uses it | no |
//! | `removal` | a device that goes without a word | no |
//! | this | all of them: events, deadlines, loss and return of the device | no |
//!
//! Each queue pair has its own completion queue, so that none can overflow and none holds what is left of a queue pair
//! that is gone, and its own receive queue: with one protection domain per tenant and peer a shared one would be shared
//! by one, and a device reports no flushed receives of a shared queue, which is how a target hears of a broken rule.
//!
//! Messages are copied into registered memory when they are posted, as the trait asks, and go out inline where the
//! device takes that; so they never need more than one piece. Writes go from ring to ring.
//!
//! A device may be absent, and come and go. While it is absent nothing connects, and each attempt looks for it again.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use self::completion::{BATCH, Completion};
use self::connect::Address;
use self::device::Incident;
use self::link::{Heard, Link, Phase, Purpose, RECEIVE};
use self::memory::{Mr, Pd};
use self::secrets::Secrets;
use self::select::Wanted;
use self::station::Station;
use super::{
    Access, Disconnect, DomainId, Endpoint, Error, Event, Fabric, Facts, Fault, Kind, LocalRange, MemoryKey,
    PostError, QpId, Region, RemoteAddress, Secret, Signal, Status, WorkId,
};

pub mod completion;
pub mod connect;
pub mod device;
pub mod link;
pub mod memory;
pub mod queue_pair;
pub mod receive;
mod removal;
pub mod ring;
mod secrets;
pub mod select;
pub mod station;

/// A dialled or expected queue pair must be connected by then: both ends have just agreed on it.
const SETUP: Duration = Duration::from_secs(5);

/// A farewell has this long to reach the peer.
const FAREWELL: Duration = Duration::from_secs(1);

/// When all is dropped, farewells have so long.
const LAST_FAREWELL: Duration = Duration::from_millis(300);

/// Looks for completions between two questions to the operating system, while there is no rest.
const LOOKS: u32 = 256;

struct Slot {
    generation: u32,
    link: Option<Box<Link>>,
}

struct Registered {
    domain: DomainId,
    access: Access,
    mr: Arc<Mr>,
}

/// See the module.
pub struct Verbs {
    wanted: Wanted,
    epoll: OwnedFd,
    station: Option<Station>,
    domains: HashMap<DomainId, Option<Arc<Pd>>>,
    regions: HashMap<u32, Registered>,
    places: u32,
    next_domain: u32,
    slots: Vec<Slot>,
    free: Vec<usize>,
    secrets: Secrets,
    happened: VecDeque<Event<'static>>,
    dirty: Vec<usize>,
    /// Completions taken from this queue pair and not looked at yet.
    batch: VecDeque<Completion>,
    batch_of: usize,
    /// Where looking for completions goes on.
    cursor: usize,
    looks: u32,
    /// A message to be told next: queue pair, slot, length.
    arrived: Option<(usize, u32, usize)>,
    /// A slot that the user is looking at.
    lent: Option<(QpId, u32)>,
}

impl Verbs {
    /// Uses the best of what is wanted, now or when it is there.
    pub fn new(wanted: Wanted) -> Result<Self, Error> {
        let mut verbs = Self::absent(wanted)?;
        if let Err(error) = verbs.station() {
            tracing::warn!(%error, "verbs");
        }
        Ok(verbs)
    }

    /// Uses the best of what is wanted, which must be there.
    pub fn open(wanted: Wanted) -> Result<Self, Error> {
        let mut verbs = Self::absent(wanted)?;
        verbs.station()?;
        Ok(verbs)
    }

    fn absent(wanted: Wanted) -> Result<Self, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| Error::Readiness(e.into()))?;
        Ok(Self {
            wanted,
            epoll,
            station: None,
            domains: HashMap::new(),
            regions: HashMap::new(),
            places: 0,
            next_domain: 1,
            slots: Vec::new(),
            free: Vec::new(),
            secrets: Secrets::default(),
            happened: VecDeque::new(),
            dirty: Vec::new(),
            batch: VecDeque::new(),
            batch_of: 0,
            cursor: 0,
            looks: 0,
            arrived: None,
            lent: None,
        })
    }

    /// The device, opening it if it is there (again).
    fn station(&mut self) -> Result<&Station, Error> {
        if self.station.is_none() {
            self.station = Some(Station::open(&self.wanted, &self.epoll)?);
        }
        Ok(self.station.as_ref().expect("just opened"))
    }

    fn pd(&mut self, domain: DomainId) -> Result<Arc<Pd>, Error> {
        if let Some(pd) = self.domains.get(&domain).ok_or(Error::UnknownDomain)? {
            return Ok(pd.clone());
        }
        let domains = self.domains.values().flatten().count();
        let station = self.station()?;
        station.check("protection domains", domains, station.limits.max_pd)?;
        let pd = Pd::new(&station.context).map_err(|source| exhausted("protection domain", source))?;
        self.domains.insert(domain, Some(pd.clone()));
        Ok(pd)
    }

    fn index(&self, qp: QpId) -> Option<usize> {
        let (generation, index) = ((qp.0 >> 32) as u32, (qp.0 & 0xffff_ffff) as usize);
        let slot = self.slots.get(index).filter(|slot| slot.generation == generation)?;
        slot.link.as_ref().filter(|link| !link.is_leaving()).map(|_| index)
    }

    fn links(&self) -> impl Iterator<Item = (usize, &Link)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| Some((index, &**slot.link.as_ref()?)))
    }

    fn link(&mut self, index: usize) -> Option<&mut Link> {
        self.slots.get_mut(index)?.link.as_deref_mut()
    }

    /// A new queue pair without a peer.
    fn insert(&mut self, domain: DomainId, vni: u32, secret: Secret, now: Instant) -> Result<usize, Error> {
        if self.station.as_ref().is_some_and(|station| !station.stands()) {
            // What stands on the address that was lost is lost too; perhaps there is another.
            self.lose_device();
        }
        let (pd, count) = (self.pd(domain)?, self.links().count());
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, link: None });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.generation = slot.generation.wrapping_add(1);
        let id = QpId(u64::from(slot.generation) << 32 | index as u64);
        let purpose = Purpose { id, domain, vni, secret, deadline: now + SETUP };
        let made = self.station().and_then(|station| station.link(purpose, &pd, count, index));
        match made {
            Ok(link) => self.slots[index].link = Some(Box::new(link)),
            Err(error) => {
                self.free.push(index);
                return Err(error);
            }
        }
        Ok(index)
    }

    fn endpoint(&self, index: usize) -> Option<(QpId, Endpoint)> {
        let (link, station) = (self.slots[index].link.as_ref()?, self.station.as_ref()?);
        Some((link.id, link.address(station.gid(), station.port.lid).endpoint()))
    }

    /// Forgets a queue pair.
    fn remove(&mut self, index: usize) {
        if self.slots[index].link.take().is_none() {
            return;
        }
        self.dirty.retain(|&other| other != index);
        if self.batch_of == index {
            self.batch.clear();
        }
        self.arrived.take_if(|(other, ..)| *other == index);
        self.free.push(index);
    }

    /// Tells the owner that a queue pair is over.
    fn settle(&mut self, index: usize, reason: Disconnect) {
        let Some(link) = self.slots[index].link.as_deref_mut().filter(|link| !link.is_leaving()) else {
            return;
        };
        let qp = link.id;
        for work in link.abandon() {
            self.happened.push_back(Event::Completed { qp, work, status: Status::Flushed });
        }
        self.happened.push_back(Event::Disconnected { qp, reason });
    }

    fn fail(&mut self, index: usize, reason: Disconnect) {
        self.settle(index, reason);
        self.remove(index);
    }

    /// What had been sent before the peer took its leave is not lost.
    fn finish(&mut self, index: usize) {
        let mut rest = if self.batch_of == index { self.batch.drain(..).collect() } else { Vec::new() };
        while !rest.is_empty() {
            for completion in rest.drain(..).filter(|c: &Completion| c.is_good() && c.id & RECEIVE == 0) {
                self.sent(index, &completion);
            }
            if let Some(link) = self.link(index) {
                // An error is an end too.
                let _ = link.completions().poll(&mut rest);
            }
        }
    }

    fn sent(&mut self, index: usize, completion: &Completion) {
        let Some(link) = self.slots[index].link.as_deref_mut() else { return };
        let (qp, happened) = (link.id, &mut self.happened);
        link.sent(completion, |work, signal| {
            if signal == Signal::Yes {
                happened.push_back(Event::Completed { qp, work, status: Status::Done });
            }
        });
        if link.confirmed() {
            self.happened.push_back(Event::Connected { qp });
        }
        if link.take_room() && link.is_open() {
            self.happened.push_back(Event::Room { qp });
        }
        if link.has_left() {
            self.remove(index);
        }
    }

    fn handle(&mut self, completion: &Completion) {
        let index = self.batch_of;
        let Some(link) = self.link(index) else { return };
        if !completion.is_good() {
            return self.fail(index, completion.reason());
        }
        if completion.id & RECEIVE == 0 {
            return self.sent(index, completion);
        }
        let slot = (completion.id & !RECEIVE) as u32;
        if !link.receives.take(slot) {
            return self.fail(index, Disconnect::Malformed("a completion that was not asked for"));
        }
        let qp = link.id;
        match link.hear(slot, completion.len) {
            Ok(Heard::Message { connected }) => {
                if connected {
                    self.happened.push_back(Event::Connected { qp });
                }
                self.arrived = Some((index, slot, completion.len));
                return;
            }
            Ok(Heard::Over(reason)) => {
                self.finish(index);
                return self.fail(index, reason);
            }
            Ok(Heard::Connected) => self.happened.push_back(Event::Connected { qp }),
            // Nobody takes it any more. With its slot not given back, what else the peer has under way is flushed there.
            Ok(Heard::Nothing) if self.slots[index].link.as_ref().is_some_and(|link| link.is_leaving()) => {
                return;
            }
            Ok(Heard::Nothing) => {}
            Err(error) => return self.fail(index, Disconnect::Io(error.kind())),
        }
        self.repost(index, slot);
    }

    fn repost(&mut self, index: usize, slot: u32) {
        if let Some(link) = self.link(index)
            && let Err(error) = link.give_back(slot)
        {
            self.fail(index, Disconnect::Io(error.kind()));
        }
    }

    /// Takes completions of the next queue pair that has any.
    fn take_batch(&mut self) -> bool {
        let mut taken = Vec::from(std::mem::take(&mut self.batch));
        taken.reserve(BATCH);
        let count = self.slots.len();
        for step in 0..count {
            let index = (self.cursor + step) % count;
            let Some(link) = self.slots[index].link.as_deref() else { continue };
            let polled = link.completions().poll(&mut taken);
            if !taken.is_empty() {
                (self.batch_of, self.cursor) = (index, index + 1);
                self.batch = taken.into();
                return true;
            }
            if polled.is_err() {
                self.fail(index, Disconnect::DeviceGone);
            }
        }
        self.batch = taken.into();
        false
    }

    /// Asks the operating system what has happened besides.
    fn ask(&mut self) {
        if self.station.is_none() {
            return;
        }
        let mut ready = [const { std::mem::MaybeUninit::uninit() }; 4];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // An interrupted wait is asked again by the caller's loop.
        let Ok((ready, _)) = epoll::wait(&self.epoll, &mut ready, Some(&zero)) else { return };
        let is_channel = |event: &epoll::Event| event.data.u64() == station::CHANNEL;
        let (woken, else_what) = (ready.iter().any(is_channel), !ready.iter().all(is_channel));
        if woken {
            self.disarm();
        }
        while else_what && let Some(incident) = self.station.as_ref().and_then(Station::next_incident) {
            self.suffer(incident);
        }
    }

    /// Takes the events of queues that were armed; there is at most one of each.
    fn disarm(&mut self) {
        let Some(channel) = self.station.as_ref().map(|station| station.channel.clone()) else { return };
        let mut armed = self.links().filter(|(_, link)| link.armed).count();
        while armed > 0
            && let Some(token) = channel.next_event()
        {
            armed -= 1;
            if let Some(link) = self.link(token) {
                link.armed = false;
            }
        }
    }

    fn suffer(&mut self, incident: Incident) {
        let port = self.station.as_ref().map(|station| station.chosen.port);
        match incident {
            Incident::Gone => self.lose_device(),
            Incident::PortDown(down) if Some(down) == port => {
                tracing::warn!(port = down, "the port is down");
                for index in 0..self.slots.len() {
                    self.fail(index, Disconnect::Io(io::ErrorKind::NetworkDown));
                }
            }
            Incident::PeerFault(token) => self.fail_token(token, Disconnect::PeerFault(Fault::Refused)),
            Incident::QueuePair(token) => self.fail_token(token, Disconnect::Io(io::ErrorKind::Other)),
            Incident::PortDown(_) | Incident::Other => {}
        }
    }

    fn fail_token(&mut self, token: usize, reason: Disconnect) {
        let found = self.links().find(|(_, link)| link.token() == token).map(|(index, _)| index);
        if let Some(index) = found {
            self.fail(index, reason);
        }
    }

    /// The device is gone, and everything on it.
    fn lose_device(&mut self) {
        let Some(station) = self.station.take() else { return };
        tracing::warn!(device = station.context.name(), "the device, or its address, is gone");
        for index in 0..self.slots.len() {
            self.fail(index, Disconnect::DeviceGone);
        }
        self.regions.clear();
        self.domains.values_mut().for_each(|pd| *pd = None);
        station.forget(&self.epoll);
    }

    /// Sees to it that the next completion wakes a sleeper.
    fn arm(&mut self) {
        for index in 0..self.slots.len() {
            let Some(link) = self.link(index).filter(|link| !link.armed) else { continue };
            match link.completions().arm() {
                Ok(()) => link.armed = true,
                Err(_) => self.fail(index, Disconnect::DeviceGone),
            }
        }
    }

    /// Looks for something to handle. Without a system call but now and then: arming and hearing that one was woken cost
    /// several, and wake others as well.
    fn look(&mut self) -> bool {
        // Also a fabric that never rests hears of its device's end.
        self.looks = self.looks.wrapping_add(1);
        if self.looks.is_multiple_of(LOOKS) {
            self.ask();
        }
        self.take_batch() || !self.happened.is_empty()
    }
}

/// The device's own word for "no more of these".
fn exhausted(what: &'static str, source: io::Error) -> Error {
    Error::Device { what, source }
}

impl AsFd for Verbs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Fabric for Verbs {
    fn kind(&self) -> Kind {
        Kind::Verbs
    }

    fn facts(&self) -> Facts {
        let mut facts =
            Facts { queue_pairs: self.links().count(), regions: self.regions.len(), ..Facts::default() };
        if let Some(station) = &self.station {
            station.describe(&mut facts);
        }
        facts
    }

    fn open_domain(&mut self) -> DomainId {
        let domain = DomainId(self.next_domain);
        self.next_domain += 1;
        self.domains.insert(domain, None);
        domain
    }

    fn close_domain(&mut self, domain: DomainId) {
        let members = self.links().filter(|(_, link)| link.domain == domain && !link.is_leaving());
        let members: Vec<QpId> = members.map(|(_, link)| link.id).collect();
        for qp in members {
            self.close(qp);
        }
        self.regions.retain(|_, region| region.domain != domain || region.revoke());
        self.domains.remove(&domain);
    }

    fn register(&mut self, domain: DomainId, region: Region, access: Access) -> Result<MemoryKey, Error> {
        let pd = self.pd(domain)?;
        let count = self.regions.len();
        let station = self.station()?;
        if count >= station.limits.max_mr || region.len() as u64 > station.limits.max_mr_size {
            return Err(Error::TooManyRegions);
        }
        self.places = self.places.wrapping_add(1);
        let mr = Mr::of_region(&pd, region, access, self.places & 0xffff);
        let mr = Arc::new(mr.map_err(|source| exhausted("region", source))?);
        let key = MemoryKey { lkey: mr.lkey(), rkey: mr.rkey(), base: mr.base() };
        self.regions.insert(key.lkey, Registered { domain, access, mr });
        Ok(key)
    }

    fn deregister(&mut self, key: MemoryKey) -> Result<(), Error> {
        let known = self.regions.get(&key.lkey).is_some_and(|region| region.mr.rkey() == key.rkey);
        let region = if known { self.regions.remove(&key.lkey) } else { None };
        region.ok_or(Error::UnknownKey)?.revoke();
        Ok(())
    }

    fn expect(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        if !self.secrets.take(&secret) {
            return Err(Error::ReusedSecret);
        }
        let index = self.insert(domain, vni, secret, now)?;
        self.endpoint(index).ok_or(Error::UnknownDomain)
    }

    fn dial(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        offer: &Endpoint,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error> {
        let peer = Address::parse(offer)?;
        let index = self.insert(domain, vni, secret, now)?;
        let dialled = self.link(index).map(|link| link.dial(&peer));
        if let Some(Err(source)) = dialled {
            self.remove(index);
            return Err(Error::Device { what: "way to the peer", source });
        }
        self.endpoint(index).ok_or(Error::UnknownDomain)
    }

    fn accept(&mut self, qp: QpId, answer: &Endpoint) -> Result<(), Error> {
        let peer = Address::parse(answer)?;
        let link = self.index(qp).and_then(|index| self.link(index));
        let link = link.filter(|link| link.phase == Phase::Expected).ok_or(Error::NotExpected)?;
        link.accept(&peer).map_err(|source| Error::Device { what: "way to the peer", source })
    }

    fn close(&mut self, qp: QpId) {
        let Some(index) = self.index(qp) else { return };
        let may_leave = self.slots[index].link.as_ref().is_some_and(|link| link.may_leave());
        self.settle(index, Disconnect::Closed);
        let left = match self.link(index) {
            Some(link) if may_leave => link.leave(Instant::now() + FAREWELL).is_ok(),
            _ => false,
        };
        if !left {
            self.remove(index);
        }
    }

    fn post_send(
        &mut self,
        qp: QpId,
        work: WorkId,
        gather: &[&[u8]],
        signal: Signal,
    ) -> Result<(), PostError> {
        let index = self.index(qp).ok_or(PostError::NotConnected)?;
        let link = self.link(index).filter(|link| link.is_open()).ok_or(PostError::NotConnected)?;
        link.post_send(work, gather, signal)?;
        if !std::mem::replace(&mut link.dirty, true) {
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
        let link = self.slots[index].link.as_deref_mut().filter(|link| link.is_open());
        let link = link.ok_or(PostError::NotConnected)?;
        let region = self.regions.get(&local.lkey).filter(|region| region.domain == link.domain);
        let mr = &region.ok_or(PostError::UnknownRegion)?.mr;
        if !mr.contains(local.offset, local.len) {
            return Err(PostError::Bounds);
        }
        link.post_write(work, mr, local, remote, signal)?;
        if !std::mem::replace(&mut link.dirty, true) {
            self.dirty.push(index);
        }
        Ok(())
    }

    fn flush(&mut self) {
        while let Some(index) = self.dirty.pop() {
            let Some(link) = self.link(index) else { continue };
            link.dirty = false;
            if let Err(error) = link.flush() {
                self.fail(index, Disconnect::Io(error.kind()));
            }
        }
    }

    fn poll(&mut self) -> Option<Event<'_>> {
        if let Some((qp, slot)) = self.lent.take()
            && let Some(index) = self.index(qp)
        {
            self.repost(index, slot);
        }
        let (index, slot, len) = loop {
            if let Some(event) = self.happened.pop_front() {
                return Some(event);
            }
            if let Some(arrived) = self.arrived.take() {
                break arrived;
            }
            match self.batch.pop_front() {
                Some(completion) => self.handle(&completion),
                None if self.look() => {}
                None => return None,
            }
        };
        let link = self.slots[index].link.as_deref()?;
        self.lent = Some((link.id, slot));
        Some(Event::Received { qp: link.id, payload: link.receives.message(slot, len).get(1..)? })
    }

    fn rest(&mut self) {
        self.ask();
        self.arm();
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.links().filter_map(|(_, link)| link.deadline).min()
    }

    fn handle_timeout(&mut self, now: Instant) {
        for index in 0..self.slots.len() {
            let late = |link: &Link| link.deadline.is_some_and(|deadline| deadline <= now);
            if self.slots[index].link.as_deref().is_some_and(late) {
                self.fail(index, Disconnect::TimedOut);
            }
        }
    }
}

impl Registered {
    /// Takes the region back from peers; true, and nothing changed, if the device will not give it back.
    fn revoke(&self) -> bool {
        match self.access {
            // No peer can name it, and a write under way may still need it: its last user takes it back.
            Access::Local => false,
            Access::RemoteWrite => self.mr.revoke().is_err(),
        }
    }
}

impl Drop for Verbs {
    /// Peers are told, as far as that goes quickly.
    fn drop(&mut self) {
        let all: Vec<QpId> = self.links().map(|(_, link)| link.id).collect();
        all.into_iter().for_each(|qp| self.close(qp));
        let end = Instant::now() + LAST_FAREWELL;
        while self.links().next().is_some() && Instant::now() < end {
            while self.poll().is_some() {}
            std::thread::sleep(Duration::from_millis(1));
        }
        self.slots.clear();
        self.regions.clear();
    }
}
