//! What a segment of the peer does to a flow.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use vsocket_channel::bell::publish_fence;
use vsocket_channel::lane::Stay as LaneStay;
use vsocket_vxlan::{Flags, Segment, StayOpen};

use crate::capture::Payload;

use super::{Ack, Drop, Fault, Flow, Heard, Life, Rx};

impl Flow {
    /// A segment of this flow and generation; `payload` if it came in the SEND, else `len` bytes have gone ahead.
    ///
    /// # Errors
    ///
    /// [`Fault`]: of the peer, if a segment was dropped (some end the flow); of the guest, always its end.
    pub fn handle(&mut self, segment: &Segment, payload: Option<&[u8]>, len: usize) -> Result<Heard, Fault> {
        let flags = segment.flags;
        if flags.contains(Flags::FIN) {
            return Ok(Heard::End);
        }
        if self.life != Life::Running {
            return Err(Fault::Peer(Drop::Stopped));
        }
        if flags.contains(Flags::RST) {
            self.handle_reset(flags);
            return Ok(Heard::Segment);
        }
        if flags.contains(Flags::ACK) {
            self.handle_ack(segment.ack, segment.window).map_err(Fault::Peer)?;
        }
        if flags.contains(Flags::SYN) {
            self.handle_open(segment.stay.open).map_err(Fault::Peer)?;
        }
        if len > 0 {
            self.handle_payload(segment.seq, payload, len)?;
        }
        Ok(Heard::Segment)
    }

    /// Where a payload that has gone ahead of its segment is, whatever became of the segment: for a capture.
    pub fn ahead(&self, seq: u32, len: usize) -> Payload<'_> {
        // The stream offset next to ours with this low half; the ring takes any.
        let from_head = seq.wrapping_sub(self.rx.head as u32) as i32;
        let at = self.rx.head.wrapping_add_signed(i64::from(from_head));
        let ring = &self.view.rings[1];
        Payload::Ring(ring, at, len.min(ring.len()))
    }

    fn handle_open(&mut self, open: Option<StayOpen>) -> Result<(), Drop> {
        let open = open.filter(|_| !self.rx.open && !self.rx.gone).ok_or(Drop::Open)?;
        let generation = self.identity.generation;
        let stay = LaneStay { generation, start: open.start, escape: open.escape };
        if self.direction(1).publish_stay(stay) {
            let (head, told) = (open.start, open.start);
            self.rx = Rx { open: true, head, told, ack: Ack::Stay, acked: head, ..Rx::default() };
        } else {
            self.rx = Rx { gone: true, reset: Some(Flags::RST), ..Rx::default() };
        }
        self.ring_due = true;
        Ok(())
    }

    fn handle_reset(&mut self, flags: Flags) {
        self.tx.closed = true;
        let reader = &self.direction(0).reader;
        let word = if flags.contains(Flags::ACK) { &reader.closed } else { &reader.sealed };
        word.store(1, Ordering::Release);
        self.ring_due = true;
    }

    /// What comes reaches nobody: its sender is told, whether or not it has sent anything, as it may be about to shut what it
    /// has sent all of; and the stream is not expected to go on.
    pub(super) fn refuse(&mut self) {
        self.rx.gone = true;
        self.rx.reset = Some(Flags::RST | Flags::ACK);
    }

    fn handle_ack(&mut self, ack: u32, window: u32) -> Result<(), Drop> {
        let Some(stay) = self.tx.stay.filter(|_| self.tx.opened) else { return Err(Drop::Acknowledgement) };
        let more = u64::from(ack.wrapping_sub(self.tx.acked as u32));
        if more > self.tx.fwd.wrapping_sub(self.tx.acked) {
            return Err(Drop::Acknowledgement);
        }
        self.tx.acked = self.tx.acked.wrapping_add(more);
        let window = u64::from(window).min(self.far_len.unwrap_or(0));
        let limit = self.tx.acked.wrapping_add(window);
        if limit.wrapping_sub(self.tx.limit) as i64 > 0 {
            self.tx.limit = limit;
        }
        // All that may be sent beyond one ring's length, the far application has made room for.
        let taken = self.tx.limit.wrapping_sub(self.far_len.unwrap_or(0));
        self.direction(0).reader.taken.store(taken, Ordering::Release);
        if !std::mem::replace(&mut self.tx.confirmed, true) {
            self.direction(0).reader.confirmed.store(stay.generation, Ordering::Release);
        }
        if more > 0 {
            self.traffic.tx_bytes += more;
            self.release();
        }
        Ok(())
    }

    /// Gives the guest its space back, and wakes it if it waits and there is enough to go on with.
    fn release(&mut self) {
        let ring = self.ring(0);
        ring.release(self.tx.acked);
        publish_fence();
        let want = &ring.indices.stay.want_space;
        if want.load(Ordering::Relaxed) == 0 {
            return;
        }
        let head = ring.indices.head.head.load(Ordering::Relaxed);
        let used = head.wrapping_sub(self.tx.acked);
        if used <= (ring.bytes.len() / 4 * 3) as u64 && want.swap(0, Ordering::AcqRel) != 0 {
            self.ring_due = true;
        }
    }

    fn handle_payload(&mut self, seq: u32, payload: Option<&[u8]>, len: usize) -> Result<(), Fault> {
        if self.rx.gone {
            return Err(Fault::Peer(Drop::ReaderGone));
        }
        if !self.rx.open {
            return Err(Fault::Peer(Drop::NoStay));
        }
        if seq != self.rx.head as u32 {
            return Err(Fault::Peer(Drop::Sequence));
        }
        let ring = self.ring(1);
        if len > ring.space(self.rx.head)? {
            return Err(Fault::Peer(Drop::Window));
        }
        if ring.indices.reader.closed.load(Ordering::Relaxed) != 0 {
            self.refuse();
            return Err(Fault::Peer(Drop::ReaderGone));
        }
        if let Some(payload) = payload {
            ring.bytes.put(self.rx.head, payload);
        }
        let head = self.rx.head.wrapping_add(len as u64);
        ring.publish(head);
        self.rx.head = head;
        if self.rx.ack == Ack::Nothing {
            self.rx.ack = Ack::Bytes;
        }
        self.ring_due = true;
        self.traffic.rx_bytes += len as u64;
        self.traffic.rx_segments += 1;
        Ok(())
    }
}
