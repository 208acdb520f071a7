//! One connection's bytes between a guest's rings and another host, for one generation. Sans-IO: segments go in by
//! [`Flow::handle`], segments and WRITEs come out of [`Flow::pump`] through [`Transmit`].
//!
//! | inner TCP | on a lane |
//! |---|---|
//! | SYN | the stay begins: its start and escape byte are in the lane's option; sent once, without payload |
//! | seq | low half of the stream offset of the payload's first byte; must be exactly the next one |
//! | ACK, ack | low half of the offset up to which the bytes are in the guest's ring; the first confirms the stay |
//! | window | how many bytes more have room in that ring |
//! | PSH | the payload follows in the same SEND; without it a payload has gone ahead by RDMA WRITE |
//! | RST | without ACK: the stay came too late, its reader had closed the generation; with ACK: the reader is gone |
//! | FIN | the sender writes nothing more in this generation, neither SEND nor WRITE |
//!
//! A payload that goes ahead is written straight from ring to ring, at its offset modulo the far ring's length; the
//! header follows it on the same queue pair, so it arrives after its payload. Space in the guest's tx ring is given back
//! only for what the far ring holds.
//!
//! Every word a guest may write is copied once and checked; one that cannot be ends this flow ([`BadIndex`]).

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use vsocket_channel::bell::publish_fence;
use vsocket_channel::lane::Stay as LaneStay;
use vsocket_channel::layout::{BELLS, Direction};
use vsocket_channel::message::Tuple;
use vsocket_channel::ring::{BadIndex, Ring};
use vsocket_vxlan::{
    Flags, MAX_HEADER_LEN, MAX_WINDOW, Segment, Stay, StayOpen, Vni, WINDOW_SHIFT, encapsulate_header,
};

use crate::capture::Payload;
use crate::config::Mac;
use crate::metrics::Traffic;
use crate::slab::View;

mod receive;
#[cfg(test)]
mod tests;

/// Payloads up to this go in the SEND with their header: two copies cost less than a WRITE of its own.
pub const SMALL: usize = 4096;
/// The longest payload of one segment.
pub const SEGMENT: usize = 32 << 10;
/// Bytes that one flow sends before the next has its turn.
const TURN: u64 = 256 << 10;

/// What a flow needs of the fabric and of the guest's doorbells.
pub trait Transmit {
    /// Sends a header and what belongs to it as one message. False: there is no room, and nothing was sent.
    fn send(&mut self, header: &[u8], payload: &[u8]) -> bool;
    /// Writes `len` bytes at `offset` of the flow's slab to `place` in the far ring. False: there is no room.
    fn write(&mut self, offset: usize, place: u64, len: usize) -> bool;
    /// Rings a doorbell of the guest.
    fn ring(&mut self, bell: usize);
    /// A segment was sent: for a capture.
    fn sent(&mut self, _header: &[u8], _payload: Payload<'_>) {}
}

/// Why a segment was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drop {
    /// The flow is stopped, and this is not its end.
    Stopped,
    /// A second SYN, or one without a beginning.
    Open,
    /// Payload before the stay was opened.
    NoStay,
    /// Not the next byte.
    Sequence,
    /// More than there was room for.
    Window,
    /// An acknowledgement of what was never sent.
    Acknowledgement,
    /// The guest's reader is gone.
    ReaderGone,
}

impl Drop {
    /// Its name in the counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stopped => "segment-after-stop",
            Self::Open => "segment-open",
            Self::NoStay => "segment-without-stay",
            Self::Sequence => "segment-sequence",
            Self::Window => "segment-window",
            Self::Acknowledgement => "segment-acknowledgement",
            Self::ReaderGone => "segment-reader-gone",
        }
    }

    /// Whether the flow cannot go on: what was dropped will not come again.
    pub fn is_fatal(self) -> bool {
        matches!(self, Self::Open | Self::NoStay | Self::Sequence | Self::Window | Self::Acknowledgement)
    }
}

/// What a segment meant for the flow's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// It goes on.
    Segment,
    /// The peer writes nothing more.
    End,
}

/// Why a flow cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The guest wrote an index that cannot be.
    Guest(BadIndex),
    /// The peer sent what cannot be.
    Peer(Drop),
}

impl From<BadIndex> for Fault {
    fn from(bad: BadIndex) -> Self {
        Self::Guest(bad)
    }
}

/// What is the same in all segments of a flow.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The tenant network.
    pub vni: Vni,
    /// Our guest's MAC, and the far guest's.
    pub macs: [Mac; 2],
    /// The connection as our guest sees it.
    pub tuple: Tuple,
    /// The generation.
    pub generation: u32,
}

/// Guest → peer.
#[derive(Debug, Default)]
struct Tx {
    /// The guest has opened its stay, here.
    stay: Option<LaneStay>,
    /// The peer was told.
    opened: bool,
    /// The peer's ring holds everything below.
    acked: u64,
    /// Sent below.
    fwd: u64,
    /// Written ahead below; the header for `fwd..written` is still to be sent.
    written: u64,
    /// May be sent below.
    limit: u64,
    /// The guest knows that the peer holds its stay.
    confirmed: bool,
    /// The peer's reader is gone or has refused the stay.
    closed: bool,
}

/// Peer → guest.
#[derive(Debug, Default)]
struct Rx {
    open: bool,
    /// The guest's ring holds everything below.
    head: u64,
    /// The peer knows that it may send below.
    told: u64,
    /// Something is to be acknowledged: at once, or when there is enough of it, with what goes the other way, or before
    /// the backend sleeps.
    ack: Ack,
    /// The peer knows that we hold everything below.
    acked: u64,
    /// A RST is due, with these flags.
    reset: Option<Flags>,
    /// Nobody here takes the bytes: the reader is gone, or had closed the generation. What comes is dropped.
    gone: bool,
}

/// What is to be acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Ack {
    #[default]
    Nothing,
    /// Bytes, which can wait.
    Bytes,
    /// The stay, which the far guest waits for.
    Stay,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    Running,
    /// Stopped; the peer is to be told.
    Stopping,
    /// Stopped, and told.
    Stopped,
}

/// See the module.
#[derive(Debug)]
pub struct Flow {
    identity: Identity,
    view: View,
    /// Length of the far ring, once it is known.
    far_len: Option<u64>,
    tx: Tx,
    rx: Rx,
    life: Life,
    ring_due: bool,
    /// What it has carried.
    pub traffic: Traffic,
}

impl Flow {
    /// A flow over this segment; it sends after [`ready`](Self::ready).
    pub fn new(identity: Identity, view: View) -> Self {
        let (tx, rx) = (Tx::default(), Rx::default());
        let traffic = Traffic::default();
        Self { identity, view, far_len: None, tx, rx, life: Life::Running, ring_due: false, traffic }
    }

    /// The peer receives in a ring of this length, a power of two.
    pub fn ready(&mut self, far_len: u64) {
        self.far_len = Some(far_len);
    }

    /// Nothing is written any more; the peer is told behind the last byte.
    pub fn stop(&mut self) {
        if self.life == Life::Running {
            self.life = Life::Stopping;
        }
    }

    /// Whether bytes are sent and not acknowledged.
    pub fn is_waiting(&self) -> bool {
        self.life == Life::Running && !self.tx.closed && self.tx.fwd != self.tx.acked
    }

    /// Whether the peer is still to be told that nothing more comes.
    pub fn owes_end(&self) -> bool {
        self.life == Life::Stopping
    }

    /// What is the same in all its segments.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn ring(&self, from: usize) -> Ring<'_> {
        Ring { indices: &self.view.header().directions[from], bytes: &self.view.rings[from] }
    }

    fn direction(&self, from: usize) -> &Direction {
        &self.view.header().directions[from]
    }

    /// Sends what there is to send, and rings for what was received. Says whether there was anything. `resting` says that
    /// the backend is about to sleep: then nothing is left unacknowledged. Before, an acknowledgement of bytes waits for
    /// bytes that go the other way, or for an eighth of the ring: alone it would be half of all segments.
    ///
    /// # Errors
    ///
    /// [`BadIndex`] of the guest: the flow must be withdrawn.
    pub fn pump(&mut self, out: &mut impl Transmit, resting: bool) -> Result<bool, BadIndex> {
        if self.life != Life::Running {
            return Ok(self.finish(out));
        }
        let mut worked = std::mem::take(&mut self.ring_due);
        if worked {
            self.ring_guest(out);
        }
        if self.tx.stay.is_none() {
            self.look_for_stay();
        }
        if self.rx.open && !self.rx.gone && self.direction(1).reader.closed.load(Ordering::Relaxed) != 0 {
            self.refuse();
        }
        // What has room in the guest's rx ring; every segment carries it.
        let free = if self.rx.open { self.ring(1).space(self.rx.head)? as u64 } else { 0 };
        if let Some(flags) = self.rx.reset
            && self.send(out, flags, self.tx.fwd, None, free, &[])
        {
            self.rx.reset = None;
            worked = true;
        }
        if self.tx.stay.is_some() && self.far_len.is_some() && !self.tx.closed {
            worked |= self.forward(out, free)?;
        }
        let grown = self.rx.head.wrapping_add(free).wrapping_sub(self.rx.told) as i64;
        let update = grown >= (self.view.rings[1].len() / 4) as i64;
        let held = self.rx.head.wrapping_sub(self.rx.acked) as usize;
        let due = match self.rx.ack {
            Ack::Nothing => false,
            Ack::Bytes => resting || held >= self.view.rings[1].len() / 8,
            Ack::Stay => true,
        };
        if self.rx.open && (due || update) {
            worked |= self.send(out, Flags::ACK, self.tx.fwd, None, free, &[]);
        }
        Ok(worked)
    }

    /// Before the backend sleeps: the guest is to ring when it has made room that the peer waits for. To be followed by
    /// the announcement on the slab's bell and one more [`pump`](Self::pump).
    pub fn arm(&self) {
        let left = self.rx.told.wrapping_sub(self.rx.head) as usize;
        if self.rx.open && left < self.view.rings[1].len() / 4 {
            self.direction(1).stay.want_space.store(1, Ordering::Relaxed);
        }
    }

    /// The stay, if the guest has published it by now.
    fn look_for_stay(&mut self) {
        let Some(stay) = self.direction(0).stay(self.identity.generation) else { return };
        let start = stay.start;
        self.tx =
            Tx { stay: Some(stay), acked: start, fwd: start, written: start, limit: start, ..Tx::default() };
    }

    /// Moves bytes from the guest's tx ring to the peer.
    fn forward(&mut self, out: &mut impl Transmit, free: u64) -> Result<bool, BadIndex> {
        let (Some(stay), Some(far_len)) = (self.tx.stay, self.far_len) else { return Ok(false) };
        if !self.tx.opened {
            let open = StayOpen { start: stay.start, escape: stay.escape };
            if !self.send(out, Flags::SYN, stay.start, Some(open), free, &[]) {
                return Ok(false);
            }
            self.tx.opened = true;
            // The far ring is empty: all of it is ours.
            self.tx.limit = stay.start.wrapping_add(far_len);
        }
        let ready = self.ring(0).available(self.tx.acked)? as u64;
        let sent = self.tx.fwd.wrapping_sub(self.tx.acked);
        let found = self.tx.acked.wrapping_add(ready);
        let pending = ready.checked_sub(sent).ok_or(BadIndex { found, own: self.tx.fwd })?;
        let end = self.tx.fwd.wrapping_add(pending.min(self.tx.limit.wrapping_sub(self.tx.fwd)));
        let stop = self.tx.fwd.wrapping_add(TURN);
        let mut worked = false;
        while self.tx.fwd != end && stop.wrapping_sub(self.tx.fwd) as i64 > 0 {
            let len = end.wrapping_sub(self.tx.fwd) as usize;
            let sent = if len <= SMALL && self.tx.written == self.tx.fwd {
                self.send_small(out, len, free)
            } else {
                self.send_ahead(out, len.min(SEGMENT), far_len, free)
            };
            if !sent {
                break;
            }
            self.traffic.tx_segments += 1;
            worked = true;
        }
        Ok(worked)
    }

    fn send_small(&mut self, out: &mut impl Transmit, len: usize, free: u64) -> bool {
        let mut payload = [0; SMALL];
        let payload = &mut payload[..len];
        self.view.rings[0].get(self.tx.fwd, payload);
        let sent = self.send(out, Flags::PSH, self.tx.fwd, None, free, payload);
        if sent {
            self.tx.fwd = self.tx.fwd.wrapping_add(len as u64);
            self.tx.written = self.tx.fwd;
        }
        sent
    }

    /// Writes up to `len` bytes ahead, then their header. What was written when room ran out is not written again.
    fn send_ahead(&mut self, out: &mut impl Transmit, len: usize, far_len: u64, free: u64) -> bool {
        let end = self.tx.fwd.wrapping_add(len as u64);
        let ring_at = self.view.ring_offset(vsocket_channel::Side::Zero);
        while self.tx.written.wrapping_sub(self.tx.fwd) < len as u64 {
            let at = self.tx.written;
            let place = at & (far_len - 1);
            let left = (end.wrapping_sub(at)).min(far_len - place) as usize;
            let (from, piece) = self.view.rings[0].piece(at, left);
            if !out.write(ring_at + from, place, piece) {
                break;
            }
            self.tx.written = at.wrapping_add(piece as u64);
        }
        let ahead = self.tx.written.wrapping_sub(self.tx.fwd) as usize;
        if ahead == 0 {
            return false;
        }
        let sent = self.send_header(out, Flags::empty(), self.tx.fwd, None, free, ahead, &[]);
        if sent {
            self.tx.fwd = self.tx.written;
        }
        sent
    }

    fn send(
        &mut self,
        out: &mut impl Transmit,
        flags: Flags,
        seq: u64,
        open: Option<StayOpen>,
        free: u64,
        payload: &[u8],
    ) -> bool {
        self.send_header(out, flags, seq, open, free, payload.len(), payload)
    }

    /// Sends one segment, with what we have to acknowledge.
    #[allow(clippy::too_many_arguments)] // the fields of a header
    fn send_header(
        &mut self,
        out: &mut impl Transmit,
        mut flags: Flags,
        seq: u64,
        open: Option<StayOpen>,
        free: u64,
        len: usize,
        payload: &[u8],
    ) -> bool {
        let Identity { vni, macs, tuple, generation } = self.identity;
        let window = if self.rx.open { free.min(u64::from(MAX_WINDOW)) as u32 } else { 0 };
        if self.rx.open {
            flags |= Flags::ACK;
        }
        let segment = Segment {
            vni,
            src_mac: macs[0].0,
            dst_mac: macs[1].0,
            src: tuple.local,
            dst: tuple.remote,
            seq: seq as u32,
            ack: if self.rx.open { self.rx.head as u32 } else { 0 },
            window,
            flags,
            stay: Stay { generation, open },
        };
        let mut header = [0; MAX_HEADER_LEN];
        // It fails only for addresses of two families or an oversized payload, and both were excluded before.
        let Ok(header_len) = encapsulate_header(&segment, len, &mut header) else { return false };
        if !out.send(&header[..header_len], payload) {
            return false;
        }
        let ahead = Payload::Ring(&self.view.rings[0], seq, len);
        out.sent(&header[..header_len], if payload.is_empty() { ahead } else { Payload::Inline(payload) });
        if self.rx.open {
            self.rx.ack = Ack::Nothing;
            self.rx.acked = self.rx.head;
            let window = u64::from(window >> WINDOW_SHIFT << WINDOW_SHIFT);
            self.rx.told = self.rx.head.wrapping_add(window);
        }
        true
    }

    /// Tells the peer that nothing more comes.
    fn finish(&mut self, out: &mut impl Transmit) -> bool {
        if self.life == Life::Stopping && self.send(out, Flags::FIN, self.tx.fwd, None, 0, &[]) {
            self.life = Life::Stopped;
            return true;
        }
        false
    }

    /// Wakes the guest's waiters of this connection. What they are to see is published before.
    fn ring_guest(&self, out: &mut impl Transmit) {
        publish_fence();
        let mask = self.view.header().waiters[0].mask.load(Ordering::Relaxed);
        let bells = &self.view.slab().bells[0];
        for (bit, bell) in bells.iter().enumerate().take(BELLS) {
            if mask & 1 << bit != 0 && bell.take() {
                out.ring(bit);
            }
        }
    }
}

/// What finds a flow: the connection as the far guest sees it, and the generation.
pub type FlowKey = (SocketAddr, SocketAddr, u32);

/// The key of the flow that a segment belongs to.
pub fn key_of(segment: &Segment) -> FlowKey {
    (segment.src, segment.dst, segment.stay.generation)
}

impl Flow {
    /// The key under which its peer's segments find it.
    pub fn key(&self) -> FlowKey {
        let Identity { tuple, generation, .. } = self.identity;
        (tuple.remote, tuple.local, generation)
    }
}
