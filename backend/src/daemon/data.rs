//! The data path: flows, and the fabric under them.
//!
//! One pass takes what the fabric has received, lets each flow of a warm slab send what it has, and hands all of it to
//! the fabric at once. What changes the life of a flow is only noted here, and done by the control side after the pass.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Instant;

use vsocket_channel::reason::Reason;
use vsocket_vxlan::{Error as VxlanError, PayloadAt, decapsulate};

use self::flows::{Entry, Flows};
use self::out::Out;
use super::shelves::Shelves;
use crate::capture::{Payload, Tap, Taps, Way};
use crate::fabric::{Access, Disconnect, DomainId, Event, Fabric, MemoryKey, QpId, RemoteAddress};
use crate::flow::{Fault, Flow, Heard, key_of};
use crate::metrics::{Named, Traffic};
use crate::peer::message::RegionRef;
use crate::slab::Slab;

mod flows;
mod out;
#[cfg(test)]
mod tests;

/// Events of the fabric that one pass takes, so that flows get to send.
const EVENTS: usize = 512;

/// What a pass found out.
#[derive(Clone, Copy, Debug)]
pub(super) enum Notice {
    Failed { flow: u64, reason: Reason },
    Quiet { flow: u64 },
    QpUp(QpId),
    QpDown(QpId, Reason),
}

/// A queue pair, up or in the making.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub qp: QpId,
    pub domain: DomainId,
    pub vni: u32,
    pub peer: u32,
    /// The number of the offer it came from, by which both ends speak of it.
    pub offer: u32,
    pub up: bool,
}

pub(super) struct Data {
    pub fabric: Box<dyn Fabric>,
    /// Why it is this one.
    pub why: String,
    flows: Flows,
    shelves: Shelves,
    pub pairs: Vec<Pair>,
    keys: HashMap<(u64, DomainId), MemoryKey>,
    pub notices: Vec<Notice>,
    taps: Taps,
    /// Flows that have said their last word.
    left: Vec<usize>,
    /// Slabs that are about to turn cold.
    cooling: Vec<usize>,
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Data").field("flows", &self.flows.len()).finish_non_exhaustive()
    }
}

impl Data {
    pub fn new(fabric: Box<dyn Fabric>) -> Self {
        Self {
            fabric,
            why: "given".to_owned(),
            flows: Flows::default(),
            shelves: Shelves::default(),
            pairs: Vec::new(),
            keys: HashMap::new(),
            notices: Vec::new(),
            taps: Taps::default(),
            left: Vec::new(),
            cooling: Vec::new(),
        }
    }

    pub fn raw_fd(&self) -> RawFd {
        self.fabric.as_fd().as_raw_fd()
    }

    pub fn is_idle(&self) -> bool {
        self.flows.len() == 0
    }

    /// Whether the flows of a virtual machine are looked at.
    pub fn machines(&self) -> bool {
        self.shelves.machines()
    }

    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.flows.iter()
    }

    /// Whether bytes that this peer got are not acknowledged. A slab with such a flow is warm.
    pub fn waits_for(&self, peer: u32) -> bool {
        let mut warm = self.shelves.warm_flows().filter_map(|at| self.flows.get(at));
        warm.any(|entry| entry.peer == peer && entry.flow.is_waiting())
    }

    /// One pass. Says whether it found anything to do. `resting`: nothing is left unacknowledged.
    pub fn pass(&mut self, drops: &mut Named, resting: bool) -> bool {
        let heard = self.hear(drops);
        let (mut sent, mut n) = (false, 0);
        while let Some(shelf) = self.shelves.nth_warm(n) {
            sent |= self.visit(shelf, drops, resting);
            n += 1;
        }
        self.finish(sent);
        heard || sent || !self.notices.is_empty()
    }

    /// Before a sleep: the fabric is to wake us, and every slab turns cold, if it can. True if there is really nothing to do.
    pub fn rest(&mut self, drops: &mut Named) -> bool {
        self.fabric.rest();
        let worked = self.cool_down(None, drops);
        !worked && self.notices.is_empty()
    }

    /// Slabs that have been idle for long enough turn cold.
    pub fn cool(&mut self, now: Instant, drops: &mut Named) {
        self.cool_down(Some(now), drops);
    }

    /// Announces on the bells of the slabs that are due, looks once more, and lets those turn cold in which nothing was
    /// found. Says whether anything was.
    fn cool_down(&mut self, now: Option<Instant>, drops: &mut Named) -> bool {
        let mut due = std::mem::take(&mut self.cooling);
        due.clear();
        self.shelves.due(now, &mut due);
        due.iter().for_each(|shelf| self.announce(*shelf));
        // What the fabric has warms its slab by itself. Who is about to sleep must know that there is nothing.
        let mut worked = now.is_none() && self.hear(drops);
        let mut sent = false;
        for at in &due {
            let found = self.visit(*at, drops, true);
            sent |= found;
            if let Some(shelf) = self.shelves.get(*at) {
                shelf.looked(found);
            }
        }
        worked |= sent;
        self.shelves.chill();
        self.finish(sent);
        self.cooling = due;
        worked
    }

    /// Who publishes in this slab from now on rings, also who makes room in a ring that a peer waits for.
    fn announce(&mut self, shelf: usize) {
        let Some(shelf) = self.shelves.get(shelf) else { return };
        shelf.flows.iter().filter_map(|at| self.flows.get(*at)).for_each(|entry| entry.flow.arm());
        shelf.announce();
    }

    /// The bell of this slab was rung.
    pub fn bell(&mut self, number: u64) {
        if let Some(shelf) = self.shelves.find(number) {
            self.shelves.warm(shelf);
        }
    }

    /// Lets the flows of a slab send. Says whether one had anything to do.
    fn visit(&mut self, shelf: usize, drops: &mut Named, resting: bool) -> bool {
        let Some(shelf) = self.shelves.get(shelf) else { return false };
        let (mut worked, mut held) = (false, false);
        for at in &shelf.flows {
            let Some(entry) = self.flows.get_mut(*at).filter(|entry| !entry.failed) else { continue };
            let fabric = &mut *self.fabric;
            let Entry { qp, lkey, far, ref bells, tapped, peer, .. } = *entry;
            let tap = (tapped != 0).then_some((&mut self.taps, tapped, peer));
            let (posted, refused, broken) = (false, false, false);
            let mut out = Out { fabric, qp, lkey, far, bells, posted, refused, broken, tap };
            let result = entry.flow.pump(&mut out, resting);
            held |= out.refused || entry.flow.is_waiting();
            if entry.leaving && !entry.flow.owes_end() {
                self.left.push(*at);
            }
            let reason = match result {
                Ok(found) => {
                    worked |= found || out.posted;
                    out.broken.then_some(Reason::FabricDown)
                }
                Err(_) => {
                    drops.count("ring-index");
                    Some(Reason::Violation)
                }
            };
            if let Some(reason) = reason {
                entry.failed = true;
                self.notices.push(Notice::Failed { flow: entry.id, reason });
            }
        }
        shelf.held = held;
        if worked {
            shelf.touch();
        }
        worked
    }

    /// Starts what was posted, and forgets who has said his last word.
    fn finish(&mut self, sent: bool) {
        if sent {
            self.fabric.flush();
        }
        self.taps.publish();
        while let Some(at) = self.left.pop() {
            self.take_out(at);
        }
    }

    /// Takes what the fabric has.
    fn hear(&mut self, drops: &mut Named) -> bool {
        for taken in 0..EVENTS {
            let Some(event) = self.fabric.poll() else { return taken > 0 };
            match event {
                Event::Received { qp, payload } => {
                    let Self { flows, shelves, pairs, notices, taps, .. } = self;
                    let mut ears = Ears { flows, shelves, pairs, notices, taps };
                    if let Err(name) = ears.receive(qp, payload) {
                        drops.count(name);
                    }
                }
                Event::Connected { qp } => self.notices.push(Notice::QpUp(qp)),
                Event::Disconnected { qp, reason } => {
                    tracing::info!(qp = qp.0, reason = reason.name(), "queue pair gone");
                    drops.count("queue-pair-lost");
                    self.notices.push(Notice::QpDown(qp, reason_of(&reason)));
                }
                Event::Refused { from, reason } => {
                    tracing::warn!(%from, reason = reason.name(), "stranger at the fabric");
                    drops.count(reason.name());
                }
                Event::Completed { .. } | Event::Room { .. } => {}
            }
        }
        true
    }

    /// The memory key of a slab in a domain, registering it if it is new there.
    pub fn key(&mut self, number: u64, slab: &Slab, domain: DomainId) -> Option<MemoryKey> {
        if let Some(key) = self.keys.get(&(number, domain)) {
            return Some(*key);
        }
        match self.fabric.register(domain, slab.memory.region(), Access::RemoteWrite) {
            Ok(key) => {
                self.keys.insert((number, domain), key);
                Some(key)
            }
            Err(error) => {
                tracing::warn!(%error, "cannot register a slab");
                None
            }
        }
    }

    /// A slab is no more.
    pub fn forget_slab(&mut self, number: u64) {
        let gone: Vec<_> = self.keys.keys().filter(|(slab, _)| *slab == number).copied().collect();
        for key in gone {
            if let Some(key) = self.keys.remove(&key) {
                // Its domain may have been closed before, and the key with it.
                let _ = self.fabric.deregister(key);
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // what a flow needs
    pub fn add(
        &mut self,
        id: u64,
        vport: u32,
        pair: Pair,
        key: MemoryKey,
        flow: Flow,
        (number, slab): (u64, &Slab),
    ) {
        let far = RemoteAddress { rkey: 0, address: 0 };
        let (peer, qp, lkey, bells) = (pair.peer, pair.qp, key.lkey, slab.bells[0].clone());
        let tapped = self.taps.mask(vport, flow.identity());
        let shelf = self.shelves.put(number, slab, self.flows.next_place());
        let (failed, leaving) = (false, false);
        self.flows.add(Entry { id, peer, vport, flow, qp, lkey, far, bells, shelf, tapped, failed, leaving });
    }

    /// Begins a capture; false if there are as many as may be.
    pub fn tap(&mut self, tap: Tap) -> bool {
        let begun = self.taps.begin(tap);
        self.tap_flows();
        begun
    }

    /// Ends a tool's capture, if it has one.
    pub fn untap(&mut self, tool: u32) -> Option<Tap> {
        let tap = self.taps.end(tool)?;
        self.tap_flows();
        Some(tap)
    }

    /// The captures that run.
    pub fn taps(&self) -> impl Iterator<Item = &Tap> {
        self.taps.iter()
    }

    fn tap_flows(&mut self) {
        for entry in self.flows.iter_mut() {
            entry.tapped = self.taps.mask(entry.vport, entry.flow.identity());
        }
    }

    /// The peer of a flow receives there.
    pub fn ready(&mut self, id: u64, rx: RegionRef) {
        if let Some(entry) = self.flows.by_id(id) {
            entry.far = RemoteAddress { rkey: rx.stag, address: rx.base };
            entry.flow.ready(rx.len);
            self.shelves.warm(entry.shelf);
        }
    }

    /// A flow is to write nothing more.
    pub fn stop(&mut self, id: u64) {
        if let Some(entry) = self.flows.by_id(id) {
            entry.failed = false;
            entry.flow.stop();
            self.shelves.warm(entry.shelf);
        }
    }

    /// Forgets a flow, at the latest when it has told the peer so: the vport it served, and what it has carried.
    pub fn remove(&mut self, id: u64) -> Option<(u32, Traffic)> {
        let at = self.flows.forget(id)?;
        let entry = self.flows.get_mut(at)?;
        let carried = (entry.vport, std::mem::take(&mut entry.flow.traffic));
        entry.leaving = true;
        let qp = entry.qp;
        if entry.flow.owes_end() && self.pairs.iter().any(|p| p.qp == qp) {
            self.shelves.warm(entry.shelf);
        } else {
            self.take_out(at);
        }
        Some(carried)
    }

    fn take_out(&mut self, at: usize) {
        if let Some(entry) = self.flows.take(at) {
            self.shelves.take(entry.shelf, at);
        }
    }

    /// The queue pair for a tenant at a peer.
    pub fn pair(&self, peer: u32, vni: u32) -> Option<Pair> {
        self.pairs.iter().find(|p| p.peer == peer && p.vni == vni).copied()
    }

    /// Gives a queue pair up, with the keys of its domain.
    pub fn close(&mut self, qp: QpId) -> Option<Pair> {
        let at = self.pairs.iter().position(|p| p.qp == qp)?;
        let pair = self.pairs.swap_remove(at);
        self.fabric.close_domain(pair.domain);
        self.keys.retain(|(_, domain), _| *domain != pair.domain);
        for at in self.flows.places(|entry| entry.leaving && entry.qp == qp) {
            self.take_out(at);
        }
        Some(pair)
    }
}

/// A peer whose end is closed has most likely ended; its control connection will say so too.
fn reason_of(lost: &Disconnect) -> Reason {
    match lost {
        Disconnect::PeerClosed | Disconnect::Io(std::io::ErrorKind::ConnectionReset) => {
            Reason::PeerBackendGone
        }
        _ => Reason::FabricDown,
    }
}

/// What hears messages of the fabric, while the fabric still holds them.
struct Ears<'a> {
    flows: &'a mut Flows,
    shelves: &'a mut Shelves,
    pairs: &'a [Pair],
    notices: &'a mut Vec<Notice>,
    taps: &'a mut Taps,
}

impl Ears<'_> {
    /// Gives a message of the fabric to its flow, or says by name why not.
    fn receive(&mut self, qp: QpId, message: &[u8]) -> Result<(), &'static str> {
        let (segment, header_len, len, ahead) = match decapsulate(message, PayloadAt::Inline) {
            Ok((segment, header_len, len)) => (segment, header_len, len, false),
            Err(VxlanError::PayloadTruncated) => {
                let (segment, header_len, len) =
                    decapsulate(message, PayloadAt::Elsewhere).map_err(|_| "segment-malformed")?;
                (segment, header_len, len, true)
            }
            Err(_) => return Err("segment-malformed"),
        };
        let vni = segment.vni;
        // A flow's tenant is its queue pair's.
        let entry = self.flows.by_key(qp, key_of(&segment)).filter(|e| e.flow.identity().vni == vni);
        let Some(entry) = entry else { return Err(stray(self.pairs, qp, vni.number())) };
        self.shelves.warm(entry.shelf);
        let payload = if ahead { None } else { message.get(header_len..) };
        let handled = entry.flow.handle(&segment, payload, len);
        if entry.tapped != 0 {
            // Also what was dropped: it was on the wire.
            let payload = payload.map_or_else(|| entry.flow.ahead(segment.seq, len), Payload::Inline);
            self.taps.take(entry.tapped, Way::Rx, entry.peer, &message[..header_len], payload);
        }
        let failed = match handled {
            Ok(Heard::Segment) => return Ok(()),
            Ok(Heard::End) => {
                self.notices.push(Notice::Quiet { flow: entry.id });
                return Ok(());
            }
            Err(Fault::Peer(drop)) if !drop.is_fatal() => return Err(drop.name()),
            Err(Fault::Peer(drop)) => drop.name(),
            Err(Fault::Guest(_)) => "ring-index",
        };
        if !std::mem::replace(&mut entry.failed, true) {
            self.notices.push(Notice::Failed { flow: entry.id, reason: Reason::Violation });
        }
        Err(failed)
    }
}

/// Why a segment belongs to no flow.
fn stray(pairs: &[Pair], qp: QpId, vni: u32) -> &'static str {
    match pairs.iter().find(|pair| pair.qp == qp) {
        None => "segment-queue-pair",
        Some(pair) if pair.vni != vni => "segment-vni",
        Some(_) => "segment-stale-or-unknown",
    }
}
