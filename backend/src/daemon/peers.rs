//! Other backends: their control connections, the queue pairs to them, and whether they are alive.

#![forbid(unsafe_code)]

use std::fmt;
use std::time::{Duration, Instant};

use vsocket_channel::reason::Reason;
use vsocket_vxlan::Vni;

use super::data::{Notice, Pair};
use super::{Daemon, Source};
use crate::fabric::{Endpoint, Error, Fabric, QpId, Secret};
use crate::flow::{Flow, Identity};
use crate::pairing::FlowStart;
use crate::peer::message::{PeerMessage, RegionRef};
use crate::slab::SegmentId;

/// While bytes are unacknowledged, a peer is asked this often.
const PING: Duration = Duration::from_millis(100);
/// A peer that has not answered for so long is given up until it does.
const SILENCE: Duration = Duration::from_millis(500);
/// After a queue pair was lost or refused, the next is asked for not before this.
const COOL: Duration = Duration::from_millis(500);

/// After the fabrics did not match: that changes with a configuration, not by itself.
const MISMATCH_COOL: Duration = Duration::from_secs(5);

/// What a control connection reports.
#[derive(Clone, Debug, PartialEq)]
pub enum LinkEvent {
    /// The connection to this peer is there, both ends known to each other.
    Up(u32),
    /// A message of this peer.
    Message(u32, PeerMessage),
    /// The connection to this peer is gone.
    Down(u32),
    /// A stranger was turned away, for the reason of this name.
    Refused(&'static str),
}

/// The control connections to all peers, by their number in the configuration. It wakes the daemon when it has an event.
pub trait Link: Send {
    /// Sends to a peer; lost if it is not connected.
    fn send(&mut self, peer: u32, message: PeerMessage);
    /// Ends the connection to a peer, so that both begin anew when it is there again. `Down` follows.
    fn reset(&mut self, peer: u32);
    /// The next event.
    fn poll(&mut self) -> Option<LinkEvent>;
}

/// The peers as the loop sees them.
pub(super) struct Peers {
    link: Box<dyn Link>,
    pub states: Vec<Peer>,
    cooling: Vec<(Instant, u32, u32)>,
    own: String,
    last_offer: u32,
    /// What the fabric last complained of, so that a device which stays away is not news twice a second.
    complaint: Option<String>,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers").field("states", &self.states).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(super) struct Peer {
    pub host: String,
    pub connected: bool,
    /// It has not answered in time, and its connection is being ended: what it says is of the past.
    pub silent: bool,
    /// The fabric it has, if that is not ours.
    pub other_fabric: Option<&'static str>,
    watch: Option<Watch>,
    last_ping: u64,
}

#[derive(Debug, Clone, Copy)]
struct Watch {
    next: Instant,
    /// Since when a question is open.
    asked: Option<Instant>,
}

impl Peers {
    pub fn new(link: Box<dyn Link>, own: String, hosts: Vec<String>) -> Self {
        let peer = |host| Peer {
            host,
            connected: false,
            silent: false,
            other_fabric: None,
            watch: None,
            last_ping: 0,
        };
        let states = hosts.into_iter().map(peer).collect();
        Self { link, states, cooling: Vec::new(), own, last_offer: 0, complaint: None }
    }

    pub fn send(&mut self, peer: u32, message: PeerMessage) {
        self.link.send(peer, message);
    }

    /// When something is due that no event will bring.
    pub fn next_deadline(&self) -> Option<Instant> {
        let watch = |w: &Watch| w.asked.map_or(w.next, |asked| w.next.min(asked + SILENCE));
        let watched = self.states.iter().filter_map(|p| p.watch.as_ref().map(watch));
        watched.chain(self.cooling.iter().map(|(at, ..)| *at)).min()
    }

    /// Whether this side dials the queue pairs to that peer.
    fn dials(&self, peer: u32) -> bool {
        self.states.get(peer as usize).is_some_and(|p| self.own < p.host)
    }

    fn cools(&self, peer: u32, vni: u32) -> bool {
        self.cooling.iter().any(|(_, p, v)| (*p, *v) == (peer, vni))
    }

    fn complain(&mut self, error: &Error) {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        if self.complaint.as_ref() != Some(&text) {
            tracing::warn!(error = text, "no queue pair");
            self.complaint = Some(text);
        }
    }

    fn set_other_fabric(&mut self, peer: u32, other: Option<&'static str>) {
        if let Some(state) = self.states.get_mut(peer as usize) {
            if let Some(theirs) = other.filter(|_| state.other_fabric != other) {
                tracing::warn!(host = state.host, theirs, "the peer's fabric is not ours");
            }
            state.other_fabric = other;
        }
    }
}

/// Why connections stay on TCP when the fabric said this.
fn decline_of(error: &Error) -> Reason {
    match error {
        Error::WrongKind { .. } => Reason::FabricMismatch,
        Error::TooManyRegions | Error::Exhausted { .. } => Reason::FabricFull,
        _ => Reason::FabricDown,
    }
}

impl Daemon {
    pub(super) fn link_ready(&mut self) {
        while let Some(event) = self.peers.as_mut().and_then(|peers| peers.link.poll()) {
            match event {
                LinkEvent::Up(peer) => {
                    self.set_peer(peer, true);
                    self.pairing.handle_peer_up(peer);
                }
                LinkEvent::Down(peer) => {
                    self.set_peer(peer, false);
                    self.drop_peer(peer, Reason::PeerBackendGone);
                }
                LinkEvent::Refused(name) => self.metrics.drops.count(name),
                LinkEvent::Message(peer, message) => self.peer_says(peer, &message),
            }
        }
    }

    fn set_peer(&mut self, peer: u32, connected: bool) {
        let state = self.peers.as_mut().and_then(|peers| peers.states.get_mut(peer as usize));
        if let Some(state) = state {
            tracing::info!(host = state.host, connected, "peer");
            (state.connected, state.silent, state.watch) = (connected, false, None);
        }
    }

    fn peer_says(&mut self, peer: u32, message: &PeerMessage) {
        let Some(peers) = &mut self.peers else { return };
        match message {
            PeerMessage::Ping { n } => return peers.send(peer, PeerMessage::Pong { n: *n }),
            PeerMessage::Pong { .. } => return self.peer_answers(peer),
            PeerMessage::QpOffer { vni, offer, secret, endpoint } => {
                return self.dial(peer, *vni, *offer, *secret, endpoint);
            }
            PeerMessage::QpAccept { vni, offer, endpoint } => {
                return self.accepted(peer, *vni, *offer, endpoint);
            }
            PeerMessage::QpRefuse { vni, offer, reason } => {
                return self.lose_pair(peer, *vni, *offer, *reason);
            }
            _ => {}
        }
        if peers.states.get(peer as usize).is_some_and(|state| state.silent) {
            return self.metrics.drops.count("peer-message-silent");
        }
        if let Err(dropped) = self.pairing.handle_peer_message(peer, message, &mut self.pool) {
            self.metrics.drops.count(dropped.name());
        }
    }

    fn peer_answers(&mut self, peer: u32) {
        let state = self.peers.as_mut().and_then(|peers| peers.states.get_mut(peer as usize));
        let Some(state) = state else { return };
        if let Some(watch) = &mut state.watch {
            watch.asked = None;
        }
    }

    /// Closes the queue pairs to a peer, and what they carried.
    fn drop_peer(&mut self, peer: u32, reason: Reason) {
        if let Some(data) = &mut self.data {
            let gone: Vec<_> = data.pairs.iter().filter(|p| p.peer == peer).map(|p| p.qp).collect();
            for qp in gone {
                data.close(qp);
            }
        }
        self.pairing.handle_peer_down(peer, reason);
    }

    /// Asks, and judges, the peers that owe us acknowledgements.
    pub(super) fn watch_peers(&mut self, now: Instant) {
        let (Some(peers), Some(data)) = (&mut self.peers, &self.data) else { return };
        let late = now.saturating_duration_since(self.watched) > SILENCE / 2;
        self.watched = now;
        let mut fallen = Vec::new();
        for (n, state) in peers.states.iter_mut().enumerate() {
            let number = n as u32;
            let waits = state.connected && !state.silent && data.waits_for(number);
            if !waits {
                state.watch = None;
                continue;
            }
            let watch = state.watch.get_or_insert(Watch { next: now + PING, asked: None });
            if late {
                // We may have been stopped ourselves: its answer may be here already, unread.
                watch.asked = watch.asked.map(|_| now);
            }
            if watch.asked.is_some_and(|asked| now >= asked + SILENCE) {
                fallen.push(number);
                continue;
            }
            if now >= watch.next {
                watch.next = now + PING;
                watch.asked.get_or_insert(now);
                state.last_ping += 1;
                peers.link.send(number, PeerMessage::Ping { n: state.last_ping });
            }
        }
        for peer in fallen {
            if let Some(peers) = &mut self.peers
                && let Some(state) = peers.states.get_mut(peer as usize)
            {
                tracing::warn!(host = state.host, "peer does not answer");
                (state.silent, state.watch) = (true, None);
                peers.link.reset(peer);
            }
            self.drop_peer(peer, Reason::NotAnswering);
        }
        self.cool(now);
    }

    fn cool(&mut self, now: Instant) {
        let Some(peers) = &mut self.peers else { return };
        let over: Vec<_> = peers.cooling.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, peer, _) in over {
            self.pairing.handle_retry(peer);
        }
    }

    /// A queue pair for a tenant is wanted: the side that listens makes the offer.
    pub(super) fn need_pair(&mut self, peer: u32, vni: u32) {
        let (Some(peers), Some(data)) = (&mut self.peers, &mut self.data) else { return };
        if data.pair(peer, vni).is_some() || peers.dials(peer) || peers.cools(peer, vni) {
            return;
        }
        let Ok(secret) = crate::fabric::new_secret() else { return };
        let domain = data.fabric.open_domain();
        match data.fabric.expect(domain, vni, secret, Instant::now()) {
            Ok((qp, endpoint)) => {
                peers.last_offer = peers.last_offer.wrapping_add(1);
                let offer = peers.last_offer;
                data.pairs.push(Pair { qp, domain, vni, peer, offer, up: false });
                peers.send(peer, PeerMessage::QpOffer { vni, offer, secret, endpoint });
            }
            Err(error) => {
                peers.complain(&error);
                data.fabric.close_domain(domain);
                self.no_pair(peer, vni, decline_of(&error));
            }
        }
    }

    fn dial(&mut self, peer: u32, vni: u32, offer: u32, secret: Secret, endpoint: &Endpoint) {
        let known = self.vports.iter().any(|v| v.config.vni == vni);
        let (Some(peers), Some(data)) = (&mut self.peers, &mut self.data) else { return };
        if !peers.dials(peer) || !known {
            self.metrics.drops.count(if known { "qp-offer-unexpected" } else { "qp-offer-vni" });
            let reason = Reason::Violation as u16;
            return peers.send(peer, PeerMessage::QpRefuse { vni, offer, reason });
        }
        if let Some(old) = data.pair(peer, vni) {
            // Who listens has lost the old one.
            self.pair_gone(old, Reason::FabricDown, false);
        }
        let (Some(peers), Some(data)) = (&mut self.peers, &mut self.data) else { return };
        let domain = data.fabric.open_domain();
        match data.fabric.dial(domain, vni, secret, endpoint, Instant::now()) {
            Ok((qp, endpoint)) => {
                data.pairs.push(Pair { qp, domain, vni, peer, offer, up: false });
                peers.send(peer, PeerMessage::QpAccept { vni, offer, endpoint });
            }
            Err(error) => {
                peers.complain(&error);
                data.fabric.close_domain(domain);
                let reason = decline_of(&error);
                if reason == Reason::FabricMismatch {
                    self.metrics.drops.count("qp-offer-fabric");
                    peers.set_other_fabric(peer, Some(endpoint.kind_name()));
                }
                peers.send(peer, PeerMessage::QpRefuse { vni, offer, reason: reason as u16 });
                self.no_pair(peer, vni, reason);
            }
        }
    }

    /// Our offer is being dialled.
    fn accepted(&mut self, peer: u32, vni: u32, offer: u32, answer: &Endpoint) {
        let Some(data) = &mut self.data else { return };
        let Some(pair) = data.pair(peer, vni).filter(|pair| pair.offer == offer) else {
            return self.metrics.drops.count("qp-accept-stale");
        };
        if let Err(error) = data.fabric.accept(pair.qp, answer) {
            let Some(peers) = &mut self.peers else { return };
            peers.complain(&error);
            self.pair_gone(pair, decline_of(&error), true);
        }
    }

    /// The peer has no queue pair of this offer, or no more.
    fn lose_pair(&mut self, peer: u32, vni: u32, offer: u32, reason: u16) {
        let Some(pair) = self.data.as_ref().and_then(|data| data.pair(peer, vni)) else { return };
        if pair.offer != offer {
            return;
        }
        let reason = match Reason::from_code(reason) {
            Some(reason @ (Reason::FabricMismatch | Reason::FabricFull)) => reason,
            _ => Reason::FabricDown,
        };
        if reason == Reason::FabricMismatch {
            self.metrics.drops.count("qp-refused-fabric");
            if let Some(peers) = &mut self.peers {
                peers.set_other_fabric(peer, Some("another"));
            }
        }
        self.pair_gone(pair, reason, false);
    }

    /// A queue pair is to be no more, at the other end too.
    fn pair_gone(&mut self, pair: Pair, reason: Reason, tell: bool) {
        let (Some(peers), Some(data)) = (&mut self.peers, &mut self.data) else { return };
        if data.close(pair.qp).is_some() {
            let Pair { peer, vni, offer, up, .. } = pair;
            if tell {
                // A device reports some failures at one end only.
                let reason = reason as u16;
                peers.send(peer, PeerMessage::QpRefuse { vni, offer, reason });
            }
            self.cool_down(peer, vni, reason);
            match up {
                true => self.pairing.handle_qp_down(peer, vni, reason),
                false => self.pairing.handle_no_qp(peer, vni, reason),
            }
        }
    }

    fn no_pair(&mut self, peer: u32, vni: u32, reason: Reason) {
        self.cool_down(peer, vni, reason);
        self.pairing.handle_no_qp(peer, vni, reason);
    }

    /// There is no queue pair, and the next is not asked for at once.
    fn cool_down(&mut self, peer: u32, vni: u32, reason: Reason) {
        let Some(peers) = &mut self.peers else { return };
        let cool = if reason == Reason::FabricMismatch { MISMATCH_COOL } else { COOL };
        if !peers.cools(peer, vni) {
            peers.cooling.push((Instant::now() + cool, peer, vni));
        }
    }

    fn pair_up(&mut self, qp: QpId) {
        let (Some(peers), Some(data)) = (&mut self.peers, &mut self.data) else { return };
        if let Some(pair) = data.pairs.iter_mut().find(|p| p.qp == qp) {
            pair.up = true;
            let (peer, vni) = (pair.peer, pair.vni);
            peers.complaint = None;
            peers.set_other_fabric(peer, None);
            self.pairing.handle_qp_up(peer, vni);
        }
    }

    /// Does what a pass of the data path found out.
    pub(super) fn take_notices(&mut self) {
        while let Some(notice) = self.data.as_mut().and_then(|data| data.notices.pop()) {
            match notice {
                Notice::Failed { flow, reason } => self.pairing.handle_flow_failed(flow, reason),
                Notice::Quiet { flow } => self.pairing.handle_quiet(flow),
                Notice::QpUp(qp) => self.pair_up(qp),
                Notice::QpDown(qp, reason) => {
                    let pairs = self.data.as_ref().map(|data| &data.pairs);
                    let pair = pairs.and_then(|pairs| pairs.iter().find(|p| p.qp == qp)).copied();
                    if let Some(pair) = pair {
                        self.pair_gone(pair, reason, true);
                    }
                }
            }
        }
    }

    /// Makes a flow and tells the peer where it receives.
    pub(super) fn start_flow(&mut self, start: &FlowStart) {
        match self.try_start(start) {
            Some(rx) => {
                let FlowStart { flow, peer_flow, generation, .. } = *start;
                let message = match start.rx {
                    Some(_) => PeerMessage::Prepared { flow, peer_flow, generation, rx },
                    None => PeerMessage::Prepare { flow, peer_flow, generation, rx },
                };
                self.send_peer(start.peer, message);
            }
            None => self.pairing.handle_unstarted(start.flow, Reason::FabricDown),
        }
    }

    fn try_start(&mut self, start: &FlowStart) -> Option<RegionRef> {
        let data = self.data.as_mut()?;
        let pair = data.pair(start.peer, start.vni).filter(|pair| pair.up)?;
        let SegmentId { slab: number, .. } = start.segment;
        let slab = self.pool.slab(number)?;
        let view = self.pool.view(start.segment)?;
        let key = data.key(number, slab, pair.domain)?;
        let vni = Vni::new(start.vni).ok()?;
        let FlowStart { macs, tuple, generation, .. } = *start;
        let ring_at = view.ring_offset(vsocket_channel::Side::One) as u64;
        let rx = RegionRef { stag: key.rkey, base: key.base + ring_at, len: view.rings[1].len() as u64 };
        let flow = Flow::new(Identity { vni, macs, tuple, generation }, view);
        data.add(start.flow, start.end.vport, pair, key, flow, (number, slab));
        if let Some(rx) = start.rx {
            data.ready(start.flow, rx);
        }
        Some(rx)
    }

    pub(super) fn send_peer(&mut self, peer: u32, message: PeerMessage) {
        if let Some(peers) = &mut self.peers {
            peers.send(peer, message);
        }
    }

    /// Joins this host to others. Call before [`run`](Daemon::run).
    ///
    /// # Errors
    ///
    /// If the fabric cannot be watched.
    pub fn join(
        &mut self,
        fabric: Box<dyn Fabric>,
        link: Box<dyn Link>,
        hosts: Vec<String>,
    ) -> std::io::Result<()> {
        let data = super::data::Data::new(fabric);
        self.watch(data.raw_fd(), Source::Fabric, mio::Interest::READABLE)?;
        self.data = Some(data);
        self.peers = Some(Peers::new(link, self.host.clone(), hosts));
        Ok(())
    }
}
