//! The data path: flows, and the fabric under them.
//!
//! One pass takes what the fabric has received, lets each flow send what it has, and hands all of it to the fabric at
//! once. What changes the life of a flow is only noted here, and done by the control side after the pass.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vsocket_channel::layout::BELLS;
use vsocket_channel::reason::Reason;
use vsocket_vxlan::{Error as VxlanError, PayloadAt, decapsulate};

use crate::capture::{Payload, Tap, Taps, Way};
use crate::fabric::{
    Access, Disconnect, DomainId, Event, Fabric, LocalRange, MemoryKey, PostError, QpId, RemoteAddress,
    Signal, WorkId,
};
use crate::flow::{Fault, Flow, FlowKey, Heard, Transmit, key_of};
use crate::metrics::{Named, Traffic};
use crate::peer::message::RegionRef;
use crate::slab::Slab;

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

/// A flow with what it needs outside itself.
#[derive(Debug)]
pub(super) struct Entry {
    pub id: u64,
    pub peer: u32,
    pub vport: u32,
    pub flow: Flow,
    pub qp: QpId,
    lkey: u32,
    far: RemoteAddress,
    bells: [Arc<OwnedFd>; BELLS],
    /// Which captures want its segments.
    tapped: u8,
    /// Reported as failed: it is not reported again.
    failed: bool,
    /// Forgotten but for its last word to the peer.
    leaving: bool,
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
    /// Dense: every pass visits all of them.
    entries: Vec<Entry>,
    by_id: HashMap<u64, usize>,
    by_key: HashMap<(QpId, FlowKey), usize>,
    pub pairs: Vec<Pair>,
    keys: HashMap<(u64, DomainId), MemoryKey>,
    pub notices: Vec<Notice>,
    taps: Taps,
    /// A flow has said its last word.
    left: bool,
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Data").field("flows", &self.entries.len()).finish_non_exhaustive()
    }
}

/// One flow's way out for the time of a call.
struct Out<'a> {
    fabric: &'a mut dyn Fabric,
    qp: QpId,
    lkey: u32,
    far: RemoteAddress,
    bells: &'a [Arc<OwnedFd>; BELLS],
    posted: bool,
    broken: bool,
    /// Only while a capture wants the flow's segments.
    tap: Option<(&'a mut Taps, u8, u32)>,
}

impl Out<'_> {
    fn posted(&mut self, result: Result<(), PostError>) -> bool {
        match result {
            Ok(()) => {
                self.posted = true;
                true
            }
            // Either there is room later, or the end of the queue pair is about to be reported.
            Err(PostError::Full | PostError::NotConnected) => false,
            Err(_) => {
                self.broken = true;
                false
            }
        }
    }
}

impl Transmit for Out<'_> {
    fn send(&mut self, header: &[u8], payload: &[u8]) -> bool {
        let result = self.fabric.post_send(self.qp, WorkId(0), &[header, payload], Signal::No);
        self.posted(result)
    }

    fn write(&mut self, offset: usize, place: u64, len: usize) -> bool {
        let local = LocalRange { lkey: self.lkey, offset, len };
        let remote = RemoteAddress { rkey: self.far.rkey, address: self.far.address.wrapping_add(place) };
        let result = self.fabric.post_write(self.qp, WorkId(0), local, remote, Signal::No);
        self.posted(result)
    }

    fn ring(&mut self, bell: usize) {
        // A bell that is full has been rung.
        let _ = rustix::io::write(&self.bells[bell], &1u64.to_ne_bytes());
    }

    fn sent(&mut self, header: &[u8], payload: Payload<'_>) {
        if let Some((taps, mask, peer)) = &mut self.tap {
            taps.take(*mask, Way::Tx, *peer, header, payload);
        }
    }
}

impl Data {
    pub fn new(fabric: Box<dyn Fabric>) -> Self {
        Self {
            fabric,
            why: "given".to_owned(),
            entries: Vec::new(),
            by_id: HashMap::new(),
            by_key: HashMap::new(),
            pairs: Vec::new(),
            keys: HashMap::new(),
            notices: Vec::new(),
            taps: Taps::default(),
            left: false,
        }
    }

    pub fn raw_fd(&self) -> RawFd {
        self.fabric.as_fd().as_raw_fd()
    }

    pub fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// One pass. Says whether it found anything to do. `resting`: before a sleep, nothing is left unacknowledged.
    pub fn pass(&mut self, drops: &mut Named, resting: bool) -> bool {
        let heard = self.hear(drops);
        let mut sent = false;
        for entry in &mut self.entries {
            if entry.failed {
                continue;
            }
            let fabric = &mut *self.fabric;
            let Entry { qp, lkey, far, ref bells, tapped, peer, .. } = *entry;
            let tap = (tapped != 0).then_some((&mut self.taps, tapped, peer));
            let mut out = Out { fabric, qp, lkey, far, bells, posted: false, broken: false, tap };
            let result = entry.flow.pump(&mut out, resting);
            self.left |= entry.leaving && !entry.flow.owes_end();
            let reason = match result {
                Ok(worked) => {
                    sent |= worked || out.posted;
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
        if sent {
            self.fabric.flush();
        }
        self.taps.publish();
        if std::mem::take(&mut self.left) {
            self.purge(|entry| entry.leaving && !entry.flow.owes_end());
        }
        heard || sent || !self.notices.is_empty()
    }

    /// Takes what the fabric has.
    fn hear(&mut self, drops: &mut Named) -> bool {
        for taken in 0..EVENTS {
            let Some(event) = self.fabric.poll() else { return taken > 0 };
            match event {
                Event::Received { qp, payload } => {
                    let vni = self.pairs.iter().find(|p| p.qp == qp).map(|p| p.vni);
                    let at = vni.ok_or("segment-queue-pair").and_then(|vni| {
                        let (entries, taps) = (&mut self.entries, &mut self.taps);
                        receive(entries, &self.by_key, qp, vni, payload, &mut self.notices, taps)
                    });
                    if let Err(name) = at {
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

    /// Before a sleep: who makes room in a ring that a peer waits for is to ring, and so is the fabric.
    pub fn arm(&mut self) {
        self.fabric.rest();
        self.entries.iter().for_each(|entry| entry.flow.arm());
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
        bells: [Arc<OwnedFd>; BELLS],
    ) {
        let at = self.entries.len();
        self.by_id.insert(id, at);
        self.by_key.insert((pair.qp, flow.key()), at);
        let far = RemoteAddress { rkey: 0, address: 0 };
        let (peer, qp, lkey) = (pair.peer, pair.qp, key.lkey);
        let tapped = self.taps.mask(vport, flow.identity());
        self.entries.push(Entry {
            id,
            peer,
            vport,
            flow,
            qp,
            lkey,
            far,
            bells,
            tapped,
            failed: false,
            leaving: false,
        });
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
        for entry in &mut self.entries {
            entry.tapped = self.taps.mask(entry.vport, entry.flow.identity());
        }
    }

    /// The peer of a flow receives there.
    pub fn ready(&mut self, id: u64, rx: RegionRef) {
        if let Some(entry) = self.by_id.get(&id).and_then(|at| self.entries.get_mut(*at)) {
            entry.far = RemoteAddress { rkey: rx.stag, address: rx.base };
            entry.flow.ready(rx.len);
        }
    }

    /// A flow is to write nothing more.
    pub fn stop(&mut self, id: u64) {
        if let Some(entry) = self.by_id.get(&id).and_then(|at| self.entries.get_mut(*at)) {
            entry.failed = false;
            entry.flow.stop();
        }
    }

    /// Forgets a flow, at the latest when it has told the peer so: the vport it served, and what it has carried.
    pub fn remove(&mut self, id: u64) -> Option<(u32, Traffic)> {
        let at = self.by_id.remove(&id)?;
        let entry = &mut self.entries[at];
        let carried = (entry.vport, std::mem::take(&mut entry.flow.traffic));
        entry.leaving = true;
        let qp = entry.qp;
        if !entry.flow.owes_end() || !self.pairs.iter().any(|p| p.qp == qp) {
            self.take_out(at);
        }
        Some(carried)
    }

    fn take_out(&mut self, at: usize) {
        let entry = self.entries.swap_remove(at);
        self.by_key.remove(&(entry.qp, entry.flow.key()));
        if let Some(moved) = self.entries.get(at) {
            if !moved.leaving {
                self.by_id.insert(moved.id, at);
            }
            self.by_key.insert((moved.qp, moved.flow.key()), at);
        }
    }

    fn purge(&mut self, gone: impl Fn(&Entry) -> bool) {
        for at in (0..self.entries.len()).rev() {
            if gone(&self.entries[at]) {
                self.take_out(at);
            }
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
        self.purge(|entry| entry.leaving && entry.qp == qp);
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

/// Gives a message of the fabric to its flow, or says by name why not.
fn receive(
    entries: &mut [Entry],
    by_key: &HashMap<(QpId, FlowKey), usize>,
    qp: QpId,
    vni: u32,
    message: &[u8],
    notices: &mut Vec<Notice>,
    taps: &mut Taps,
) -> Result<(), &'static str> {
    let (segment, header_len, len, ahead) = match decapsulate(message, PayloadAt::Inline) {
        Ok((segment, header_len, len)) => (segment, header_len, len, false),
        Err(VxlanError::PayloadTruncated) => {
            let (segment, header_len, len) =
                decapsulate(message, PayloadAt::Elsewhere).map_err(|_| "segment-malformed")?;
            (segment, header_len, len, true)
        }
        Err(_) => return Err("segment-malformed"),
    };
    if segment.vni.number() != vni {
        return Err("segment-vni");
    }
    let entry = by_key.get(&(qp, key_of(&segment))).and_then(|at| entries.get_mut(*at));
    let entry = entry.ok_or("segment-stale-or-unknown")?;
    let payload = if ahead { None } else { message.get(header_len..) };
    let handled = entry.flow.handle(&segment, payload, len);
    if entry.tapped != 0 {
        // Also what was dropped: it was on the wire.
        let payload = payload.map_or_else(|| entry.flow.ahead(segment.seq, len), Payload::Inline);
        taps.take(entry.tapped, Way::Rx, entry.peer, &message[..header_len], payload);
    }
    let failed = match handled {
        Ok(Heard::Segment) => return Ok(()),
        Ok(Heard::End) => {
            notices.push(Notice::Quiet { flow: entry.id });
            return Ok(());
        }
        Err(Fault::Peer(drop)) if !drop.is_fatal() => return Err(drop.name()),
        Err(Fault::Peer(drop)) => drop.name(),
        Err(Fault::Guest(_)) => "ring-index",
    };
    if !std::mem::replace(&mut entry.failed, true) {
        notices.push(Notice::Failed { flow: entry.id, reason: Reason::Violation });
    }
    Err(failed)
}
