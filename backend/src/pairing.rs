//! Who meets whom: open, pair, prepare, commit, withdraw, leave. Sans-IO: events go in by `handle_*`, what is to be done
//! comes out of [`Pairing::poll`]; time is an argument.
//!
//! An **end** is a connection as its vport's agent opened it. A **stay** is one generation of a connection on a lane; it
//! has two **parties**: the end here, and across either another end here (`direct`) or a peer's flow (`fabric`).
//!
//! | end | event | becomes |
//! |---|---|---|
//! | open | its mirrored end is open too | staying: both are asked to prepare |
//! | staying | both have prepared | staying, and told: commit |
//! | staying | refused as busy | resting for 50 ms, then open; after ten times spent |
//! | staying | refused, left | spent: waits for a new `Open` |
//! | staying | `Open` again | staying, and open as soon as it has left |
//! | spent | `Open` again | open |
//! | any | `Close`, agent gone | forgotten; its stay waits for `Left`, or is lost |
//!
//! A stay that ends, however it does, is over only when each party uses its memory no longer: a guest says `Left` (or
//! `Refused`), a peer ends its stream on the queue pair behind its last WRITE, and a dead agent never says it, so that
//! the segment is lost. Until then the segment is in quarantine. Of two that a relay joins each is free by itself.

#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use vsocket_channel::message::{Lane, Message, Tuple};
use vsocket_channel::reason::Reason;

use crate::config::Mac;
use crate::directory::Directory;
use crate::peer::message::HostName;
use crate::slab::{Program, Segments};

mod effect;
mod local;
mod peer;
mod remote;
mod stay;
mod view;

#[cfg(test)]
mod relay_tests;
#[cfg(test)]
mod remote_tests;
#[cfg(test)]
mod tests;

pub use effect::{Effect, FlowStart, RelayStart};
pub use peer::Dropped;
use stay::{GuestPhase, Stay};
pub use view::{Lanes, Line};

/// An end that was busy is asked again after this: its counters stand still for a moment between two of its bytes.
const REST: Duration = Duration::from_millis(2);
/// And so often.
const TRIES: u8 = 100;

/// A connection of a vport, by its agent's number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct EndId {
    /// The vport.
    pub vport: u32,
    /// The agent's number.
    pub conn: u64,
}

/// What pairing must know of a vport.
#[derive(Clone, Debug)]
pub struct VportFacts {
    /// Its tenant network.
    pub vni: u32,
    /// Its inner addresses.
    pub addresses: Vec<IpAddr>,
    /// Its inner MAC.
    pub mac: Mac,
    /// Its quota.
    pub max_connections: u32,
    /// Its rings' size.
    pub ring_len: u64,
    /// It shares no memory with other guests: its connections on this host are relayed.
    pub relayed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum EndState {
    /// To be paired as soon as the other end is there.
    Open,
    /// Was busy; will be open again.
    Resting,
    /// In a stay.
    Staying(u64),
    /// Waits for a new `Open`.
    Spent,
}

#[derive(Debug)]
struct End {
    program: u64,
    tuple: Tuple,
    min_generation: u32,
    state: EndState,
    /// Opened again before it had left its stay.
    reopened: bool,
    tries: u8,
    /// The reason that the agent knows.
    told: Option<Reason>,
    /// Our number of the offer that a peer knows.
    offer: Option<u64>,
}

#[derive(Debug)]
struct Vport {
    facts: VportFacts,
    drained: bool,
    /// The guest stands still, and its memory is not touched.
    paused: bool,
    ends: u32,
    /// Ends that were told that their far one is not open, and perhaps wait for it still.
    lonely: VecDeque<EndId>,
}

impl Vport {
    /// Why its connections stay on TCP, if they have to.
    fn barred(&self) -> Option<Reason> {
        let reasons = [(self.drained, Reason::Drained), (self.paused, Reason::GuestPaused)];
        reasons.into_iter().find_map(|(is, reason)| is.then_some(reason))
    }
}

/// Another backend's offer, waiting for our end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RemoteOffer {
    /// Tenant, and the connection as our end sees it.
    key: (u32, Tuple),
    peer: u32,
    flow: u64,
    min_generation: u32,
}

/// What a flow number of ours stands for.
#[derive(Clone, Copy, Debug)]
enum FlowUse {
    Offer(EndId),
    Stay(u64),
}

/// Where an address is.
enum Place {
    Vport(u32),
    Peer(u32, Mac),
    Nowhere,
}

/// All ends and stays of this host.
#[derive(Debug)]
pub struct Pairing {
    vports: Vec<Vport>,
    local: HashMap<(u32, IpAddr), u32>,
    directory: Directory,
    hosts: HashMap<HostName, u32>,
    ends: HashMap<EndId, End>,
    by_tuple: HashMap<(u32, Tuple), EndId>,
    stays: HashMap<u64, Stay>,
    /// Parties that have not left yet: (end, generation) → stay and place in it.
    parties: BTreeMap<(EndId, u32), (u64, usize)>,
    peers_up: HashSet<u32>,
    qps: HashSet<(u32, u32)>,
    /// Why the last attempt at a queue pair came to nothing.
    no_qp: HashMap<(u32, u32), Reason>,
    remote_offers: HashMap<(u32, Tuple), RemoteOffer>,
    flows: HashMap<u64, FlowUse>,
    ready: VecDeque<EndId>,
    resting: BinaryHeap<Reverse<(Instant, EndId)>>,
    effects: VecDeque<Effect>,
    last_stay: u64,
    last_flow: u64,
    stopping: bool,
}

impl Pairing {
    /// Nobody is there yet. `hosts` gives the peers their numbers.
    pub fn new(vports: Vec<VportFacts>, directory: Directory, hosts: &[HostName]) -> Self {
        let each = |(n, facts): (usize, &VportFacts)| {
            let vni = facts.vni;
            facts.addresses.iter().map(move |a| ((vni, a.to_canonical()), n as u32)).collect::<Vec<_>>()
        };
        let local = vports.iter().enumerate().flat_map(each).collect();
        let vports = vports
            .into_iter()
            .map(|facts| Vport { facts, drained: false, paused: false, ends: 0, lonely: VecDeque::new() })
            .collect();
        let hosts = hosts.iter().enumerate().map(|(n, host)| (host.clone(), n as u32)).collect();
        Self {
            vports,
            local,
            directory,
            hosts,
            ends: HashMap::new(),
            by_tuple: HashMap::new(),
            stays: HashMap::new(),
            parties: BTreeMap::new(),
            peers_up: HashSet::new(),
            qps: HashSet::new(),
            no_qp: HashMap::new(),
            remote_offers: HashMap::new(),
            flows: HashMap::new(),
            ready: VecDeque::new(),
            resting: BinaryHeap::new(),
            effects: VecDeque::new(),
            last_stay: 0,
            last_flow: 0,
            stopping: false,
        }
    }

    /// The next thing to do, pairing who can be paired.
    pub fn poll(&mut self, segments: &mut impl Segments) -> Option<Effect> {
        loop {
            if let Some(effect) = self.effects.pop_front() {
                return Some(effect);
            }
            let id = self.ready.pop_front()?;
            if !self.stopping {
                self.try_pair(id, segments);
            }
        }
    }

    /// Whether [`poll`](Self::poll) has something to do.
    pub fn has_work(&self) -> bool {
        !self.effects.is_empty() || !self.ready.is_empty()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.resting.peek().map(|Reverse((at, _))| *at)
    }

    /// Ends whose rest is over are open again.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.resting.peek().copied()
            && at <= now
        {
            self.resting.pop();
            if let Some(end) = self.ends.get_mut(&id)
                && end.state == EndState::Resting
            {
                end.state = EndState::Open;
                self.ready.push_back(id);
            }
        }
    }

    /// An agent opens a connection, or opens it again.
    pub fn handle_open(&mut self, id: EndId, program: u64, tuple: Tuple, min_generation: u32) {
        let Some(vport) = self.vports.get_mut(id.vport as usize) else { return };
        let vni = vport.facts.vni;
        if self.local.get(&(vni, tuple.local.ip())) != Some(&id.vport) {
            return self.decline(id, Reason::AddressNotYours);
        }
        if self.by_tuple.get(&(vni, tuple)).is_some_and(|other| *other != id) {
            return self.decline(id, Reason::TupleTaken);
        }
        if self.ends.get(&id).is_some_and(|end| end.tuple != tuple) {
            // The number stands for another connection now: the agent has forgotten to close it.
            self.handle_close(id);
            return self.handle_open(id, program, tuple, min_generation);
        }
        if let Some(end) = self.ends.get_mut(&id) {
            let raised = min_generation > end.min_generation;
            end.program = program;
            end.min_generation = end.min_generation.max(min_generation);
            end.told = None;
            end.tries = 0;
            match end.state {
                EndState::Staying(_) => end.reopened = true,
                _ => {
                    end.state = EndState::Open;
                    if raised {
                        self.withdraw_offer(id, Reason::Superseded);
                    }
                    self.ready.push_back(id);
                }
            }
            return;
        }
        if vport.ends >= vport.facts.max_connections && !self.displace(id.vport, (vni, tuple)) {
            return self.decline(id, Reason::Quota);
        }
        self.vports[id.vport as usize].ends += 1;
        // A closed connection of this number may not have left all its generations yet.
        let held = self.parties.range((id, 0)..=(id, u32::MAX)).next_back();
        let held = held.map(|((_, generation), _)| generation.saturating_add(1));
        let min_generation = min_generation.max(held.unwrap_or(1));
        let state = EndState::Open;
        let end =
            End { program, tuple, min_generation, state, reopened: false, tries: 0, told: None, offer: None };
        self.ends.insert(id, end);
        self.by_tuple.insert((vni, tuple), id);
        self.ready.push_back(id);
    }

    /// A vport has as many ends as it may, and one is opened whose far end is there already: one that waits for its own makes
    /// room, and is opened again later. Or two guests that filled their quotas with different connections would wait for
    /// each other for good.
    fn displace(&mut self, vport: u32, (vni, tuple): (u32, Tuple)) -> bool {
        let far = self.by_tuple.get(&(vni, tuple.mirrored())).and_then(|far| self.ends.get(far));
        let awaited = far.is_some_and(|end| end.state == EndState::Open);
        if !awaited && !self.remote_offers.contains_key(&(vni, tuple)) {
            return false;
        }
        while let Some(id) = self.vports[vport as usize].lonely.pop_front() {
            if self.is_lonely(id) {
                self.decline(id, Reason::Quota);
                self.handle_close(id);
                return true;
            }
        }
        false
    }

    /// Whether an end waits for its far one to be opened.
    fn is_lonely(&self, id: EndId) -> bool {
        let lonely = |end: &End| end.state == EndState::Open && end.told == Some(Reason::PeerNotOpen);
        self.ends.get(&id).is_some_and(lonely)
    }

    /// An end is ready to receive.
    pub fn handle_prepared(&mut self, id: EndId, generation: u32) {
        let Some((stay, at)) = self.parties.get(&(id, generation)).copied() else { return };
        if let Some(guest) = self.guest(stay, at)
            && guest.phase == GuestPhase::Asked
        {
            guest.phase = GuestPhase::Ready;
            self.advance(stay);
        }
    }

    /// An end cannot, now or at all.
    pub fn handle_refused(&mut self, id: EndId, generation: u32, reason: Reason, now: Instant) {
        let Some((stay, at)) = self.parties.get(&(id, generation)).copied() else { return };
        let ending = self.stays.get(&stay).is_none_or(|s| s.ending);
        if reason == Reason::Busy
            && !ending
            && let Some(end) = self.ends.get_mut(&id)
            && end.tries < TRIES
        {
            end.tries += 1;
            end.state = EndState::Resting;
            self.resting.push(Reverse((now + REST, id)));
            if let Some(stay) = self.stays.get_mut(&stay) {
                stay.again = true;
            }
        }
        self.leave(stay, at, reason);
    }

    /// An end is about to leave a generation, and the other is to leave it too.
    pub fn handle_leaving(&mut self, id: EndId, generation: u32, reason: Reason) {
        if let Some((stay, _)) = self.parties.get(&(id, generation)).copied() {
            self.silence(stay, id, GuestPhase::Withdrawn, reason);
        }
    }

    /// An end uses a generation no longer.
    pub fn handle_left(&mut self, id: EndId, generation: u32) {
        if let Some((stay, at)) = self.parties.get(&(id, generation)).copied() {
            self.leave(stay, at, Reason::PeerLeft);
        }
    }

    /// A connection is no more.
    pub fn handle_close(&mut self, id: EndId) {
        self.withdraw_offer(id, Reason::Ending);
        let Some(end) = self.ends.remove(&id) else { return };
        let vport = &mut self.vports[id.vport as usize];
        vport.ends -= 1;
        self.by_tuple.remove(&(vport.facts.vni, end.tuple));
        if let EndState::Staying(stay) = end.state {
            self.silence(stay, id, GuestPhase::Withdrawn, Reason::Ending);
        }
    }

    /// A vport's agent has gone, and with it what it knew.
    pub fn handle_detached(&mut self, vport: u32) {
        for (id, stay) in self.held(vport) {
            self.silence(stay, id, GuestPhase::Lost, Reason::PeerLeft);
        }
        let ends: Vec<EndId> = self.ends.keys().filter(|id| id.vport == vport).copied().collect();
        for id in ends {
            self.handle_close(id);
        }
    }

    /// The operator moves a vport's connections to TCP, or lets them return.
    pub fn handle_drain(&mut self, vport: u32, on: bool) -> bool {
        let Some(state) = self.vports.get_mut(vport as usize) else { return false };
        if std::mem::replace(&mut state.drained, on) != on {
            self.bar(vport, on.then_some(Reason::Drained));
        }
        true
    }

    /// A guest's memory is not to be touched any more, or may be again.
    pub fn handle_pause(&mut self, vport: u32, on: bool) {
        let Some(state) = self.vports.get_mut(vport as usize) else { return };
        if std::mem::replace(&mut state.paused, on) != on {
            self.bar(vport, on.then_some(Reason::GuestPaused));
        }
    }

    fn bar(&mut self, vport: u32, why: Option<Reason>) {
        if let Some(reason) = why {
            let message = Message::Withdraw { conn: 0, generation: 0, reason };
            self.effects.push_back(Effect::Tell { vport, message });
            for (id, stay) in self.held(vport) {
                self.silence(stay, id, GuestPhase::Withdrawn, reason);
            }
        }
        let open =
            |(id, end): (&EndId, &End)| (id.vport == vport && end.state == EndState::Open).then_some(*id);
        let open: Vec<EndId> = self.ends.iter().filter_map(open).collect();
        self.ready.extend(open);
    }

    /// A program has ended, or can be woken no more: its stays are over.
    pub fn handle_program_gone(&mut self, (vport, program): Program, reason: Reason) {
        let its = |(id, end): (&EndId, &End)| match end.state {
            EndState::Staying(stay) => (id.vport == vport && end.program == program).then_some(stay),
            _ => None,
        };
        let stays: Vec<u64> = self.ends.iter().filter_map(its).collect();
        for stay in stays {
            self.end_stay(stay, reason, usize::MAX);
            self.settle(stay);
        }
    }

    /// The daemon is about to end: no new stays, and every end leaves the lane that we move bytes on. Direct lanes go on
    /// without us.
    pub fn handle_stop(&mut self, reason: Reason) {
        self.stopping = true;
        let carried = self.stays.iter().filter(|(_, stay)| stay.lane() == Lane::Fabric);
        let carried: Vec<u64> = carried.map(|(id, _)| *id).collect();
        for id in carried {
            self.end_stay(id, reason, usize::MAX);
            self.settle(id);
        }
    }

    /// There is memory for a program of a virtual machine now, or there will be none for now: who waits for it looks again.
    pub fn handle_memory(&mut self, (vport, program): Program) {
        let waits = |(id, end): (&EndId, &End)| {
            let its = id.vport == vport && end.program == program && end.state == EndState::Open;
            its.then_some(*id)
        };
        let open: Vec<EndId> = self.ends.iter().filter_map(waits).collect();
        self.ready.extend(open);
    }

    /// As [`handle_memory`](Self::handle_memory), for all programs of a virtual machine.
    pub fn handle_memory_of(&mut self, vport: u32) {
        self.bar(vport, None);
    }

    /// The ends of a vport that have not left their stays.
    fn held(&self, vport: u32) -> Vec<(EndId, u64)> {
        let of = self.parties.iter().filter(|((id, _), _)| id.vport == vport);
        of.map(|((id, _), (stay, _))| (*id, *stay)).collect()
    }

    fn vni(&self, id: EndId) -> u32 {
        self.vports[id.vport as usize].facts.vni
    }

    fn place(&self, vni: u32, address: IpAddr) -> Place {
        if let Some(vport) = self.local.get(&(vni, address)) {
            return Place::Vport(*vport);
        }
        let place = self.directory.find(vni, address);
        match place.and_then(|p| Some((*self.hosts.get(&p.host)?, p.mac))) {
            Some((peer, mac)) => Place::Peer(peer, mac),
            None => Place::Nowhere,
        }
    }

    fn decline(&mut self, id: EndId, reason: Reason) {
        let known = self.ends.get_mut(&id).map(|end| end.told.replace(reason));
        if known != Some(Some(reason)) {
            if reason == Reason::PeerNotOpen {
                self.remember_lonely(id);
            }
            let message = Message::Declined { conn: id.conn, reason };
            self.effects.push_back(Effect::Tell { vport: id.vport, message });
        }
    }

    fn remember_lonely(&mut self, id: EndId) {
        let Some(vport) = self.vports.get_mut(id.vport as usize) else { return };
        vport.lonely.push_back(id);
        if vport.lonely.len() > 2 * vport.facts.max_connections as usize {
            // Most have met their far end since.
            let mut lonely = std::mem::take(&mut vport.lonely);
            lonely.retain(|id| self.is_lonely(*id));
            self.vports[id.vport as usize].lonely = lonely;
        }
    }

    fn try_pair(&mut self, id: EndId, segments: &mut impl Segments) {
        let Some(end) = self.ends.get(&id).filter(|end| end.state == EndState::Open) else { return };
        let (vni, tuple) = (self.vni(id), end.tuple);
        if let Some(reason) = self.vports[id.vport as usize].barred() {
            self.withdraw_offer(id, reason);
            return self.decline(id, reason);
        }
        match self.place(vni, tuple.remote.ip()) {
            Place::Vport(other) if other != id.vport => {
                let far = self.by_tuple.get(&(vni, tuple.mirrored())).copied();
                let far = far.filter(|far| self.ends.get(far).is_some_and(|e| e.state == EndState::Open));
                match far {
                    _ if self.vports[other as usize].barred().is_some() => self.decline(id, Reason::Drained),
                    Some(far) => self.start_local(id.min(far), id.max(far), segments),
                    None => self.decline(id, Reason::PeerNotOpen),
                }
            }
            Place::Peer(peer, _) => self.try_remote(id, peer, segments),
            // Both ends in one guest are not paired yet.
            Place::Vport(_) | Place::Nowhere => self.decline(id, Reason::PeerUnknown),
        }
    }
}
