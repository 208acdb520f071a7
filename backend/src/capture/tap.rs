//! The daemon's end of a capture: from the data path into the queue.

#![forbid(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vsocket_channel::bell::publish_fence;
use vsocket_channel::layout::Geometry;
use vsocket_channel::ring::{Bytes, Ring};
use vsocket_vxlan::MAX_PAYLOAD;

use super::{CAPTURES, Filter, MAX_QUEUE, MIN_QUEUE, Record, Way};
use crate::flow::Identity;
use crate::slab::{Doorbell, Memory, View};

/// Where a segment's payload is.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// In private memory: it goes, or came, in the segment's SEND.
    Inline(&'a [u8]),
    /// In a guest's ring, at this offset of the stream and so long: it goes, or came, by WRITE.
    Ring(&'a Bytes, u64, usize),
}

impl Payload<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Inline(bytes) => bytes.len(),
            Self::Ring(_, _, len) => *len,
        }
    }
}

/// One capture.
#[derive(Debug)]
pub struct Tap {
    /// The tool it belongs to, by its place.
    pub tool: u32,
    filter: Filter,
    snaplen: usize,
    /// This host's VTEP and the peer's, for each peer.
    ends: Vec<(IpAddr, IpAddr)>,
    view: View,
    memfd: Arc<OwnedFd>,
    bell: Doorbell,
    head: u64,
    published: u64,
    segments: u64,
    full: u64,
    /// The tool has written an index that cannot be; nothing is captured any more, only counted.
    broken: u64,
    scratch: Box<[u8]>,
}

impl Tap {
    /// A capture with a queue of `queue` bytes.
    ///
    /// # Errors
    ///
    /// If the queue cannot be of that size, or the system does not give it.
    pub fn new(
        tool: u32,
        filter: Filter,
        snaplen: u32,
        queue: u64,
        ends: Vec<(IpAddr, IpAddr)>,
    ) -> io::Result<Self> {
        let geometry = Geometry::new(1, queue).filter(|_| (MIN_QUEUE..=MAX_QUEUE).contains(&queue));
        let (memfd, memory) = Memory::create(geometry.ok_or(io::ErrorKind::InvalidInput)?)?;
        let view = View::new(&Arc::new(memory), 0).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            tool,
            filter,
            snaplen: snaplen as usize,
            ends,
            view,
            memfd: Arc::new(memfd),
            bell: Doorbell::new()?,
            head: 0,
            published: 0,
            segments: 0,
            full: 0,
            broken: 0,
            scratch: vec![0; MAX_PAYLOAD].into(),
        })
    }

    /// What the tool gets beside the answer: the queue's memory and its bell.
    pub fn descriptors(&self) -> Vec<Arc<OwnedFd>> {
        vec![self.memfd.clone(), self.bell.fd()]
    }

    /// Its counters.
    pub fn counters(&self) -> Value {
        json!({ "segments": self.segments, "dropped": { "queue-full": self.full, "queue-index": self.broken } })
    }

    fn ring(&self) -> Ring<'_> {
        Ring { indices: &self.view.header().directions[1], bytes: &self.view.rings[1] }
    }

    /// Copies a segment to the queue, if it has room.
    fn take(&mut self, way: Way, peer: u32, header: &[u8], payload: Payload<'_>) {
        self.segments += 1;
        let kept = payload.len().min(self.snaplen.saturating_sub(header.len())).min(self.scratch.len());
        let nowhere = (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into());
        let record = Record {
            way,
            header: header.len(),
            payload: payload.len(),
            kept,
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            ends: self.ends.get(peer as usize).copied().unwrap_or(nowhere),
        };
        match self.ring().space(self.head) {
            Ok(space) if space >= record.whole() && self.broken == 0 => {}
            Ok(_) if self.broken == 0 => return self.full += 1,
            _ => return self.broken += 1,
        }
        let bytes = match payload {
            Payload::Inline(bytes) => &bytes[..kept],
            Payload::Ring(ring, at, _) => {
                // By way of private memory: both rings may change under our hands.
                ring.get(at, &mut self.scratch[..kept]);
                &self.scratch[..kept]
            }
        };
        let mut at = self.head;
        for part in [&record.encode()[..], header, bytes] {
            self.view.rings[1].put(at, part);
            at = at.wrapping_add(part.len() as u64);
        }
        self.head = at;
    }

    /// Shows the tool what was taken since the last time.
    fn publish(&mut self) {
        if self.head == self.published {
            return;
        }
        self.published = self.head;
        self.ring().publish(self.head);
        publish_fence();
        if self.view.slab().bells[0][0].take() {
            self.bell.ring();
        }
    }
}

/// All captures of a host.
#[derive(Debug, Default)]
pub struct Taps {
    taps: [Option<Tap>; CAPTURES],
    /// Something was taken that the tools have not been shown.
    taken: bool,
}

impl Taps {
    /// Begins a capture; false if there are as many as may be.
    pub fn begin(&mut self, tap: Tap) -> bool {
        let free = self.taps.iter_mut().find(|slot| slot.is_none());
        free.is_some_and(|slot| slot.replace(tap).is_none())
    }

    /// Ends the capture of a tool, if it has one. All that was taken is shown before.
    pub fn end(&mut self, tool: u32) -> Option<Tap> {
        let slot = self.taps.iter_mut().find(|slot| slot.as_ref().is_some_and(|tap| tap.tool == tool))?;
        let mut tap = slot.take()?;
        tap.publish();
        Some(tap)
    }

    /// Those that run.
    pub fn iter(&self) -> impl Iterator<Item = &Tap> {
        self.taps.iter().flatten()
    }

    /// Which captures want the segments of a flow; bit n is the n-th.
    pub fn mask(&self, vport: u32, flow: &Identity) -> u8 {
        let wants = |slot: &Option<Tap>| {
            slot.as_ref().is_some_and(|tap| tap.filter.matches(vport, flow.vni.number(), &flow.tuple))
        };
        self.taps.iter().rev().fold(0, |mask, slot| mask << 1 | u8::from(wants(slot)))
    }

    /// A segment of a flow with this mask, to or from this peer.
    #[cold]
    pub fn take(&mut self, mask: u8, way: Way, peer: u32, header: &[u8], payload: Payload<'_>) {
        for (n, tap) in self.taps.iter_mut().enumerate() {
            if let Some(tap) = tap.as_mut().filter(|_| mask & 1 << n != 0) {
                tap.take(way, peer, header, payload);
                self.taken = true;
            }
        }
    }

    /// After a pass: shows the tools what it has taken.
    pub fn publish(&mut self) {
        if std::mem::take(&mut self.taken) {
            self.taps.iter_mut().flatten().for_each(Tap::publish);
        }
    }
}

/// For each peer's VTEP the one of ours that faces it: `own`, or where that is unspecified or of the other family, the
/// address that the kernel would send from.
pub fn vteps(own: Option<IpAddr>, peers: &[IpAddr]) -> Vec<(IpAddr, IpAddr)> {
    let facing = |peer: &IpAddr| {
        let usable = own.filter(|own| own.is_ipv4() == peer.is_ipv4() && !own.is_unspecified());
        let any: IpAddr =
            if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let routed = || {
            // Connecting a UDP socket sends nothing; it only asks for the route.
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.connect((*peer, vsocket_vxlan::udp::PORT_VXLAN)).ok()?;
            Some(socket.local_addr().ok()?.ip())
        };
        (usable.or_else(routed).unwrap_or(any), *peer)
    };
    peers.iter().map(facing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(tool: u32, queue: u64) -> Tap {
        let ends = vteps("192.0.2.1".parse().ok(), &["192.0.2.2".parse().unwrap()]);
        Tap::new(tool, Filter::default(), 200, queue, ends).unwrap()
    }

    /// What a tool would read.
    fn records(tap: &Tap, tail: &mut u64) -> Vec<(Record, Vec<u8>)> {
        let mut found = Vec::new();
        while tap.ring().available(*tail).unwrap() > 0 {
            let mut image = [0; super::super::RECORD_LEN];
            tap.view.rings[1].get(*tail, &mut image);
            let record = Record::decode(&image);
            let mut rest = vec![0; record.header + record.kept];
            tap.view.rings[1].get(*tail + image.len() as u64, &mut rest);
            *tail += record.whole() as u64;
            found.push((record, rest));
        }
        tap.ring().release(*tail);
        found
    }

    #[test]
    fn segments_are_shown_after_the_pass_and_cut_at_the_snap_length() {
        let mut taps = Taps::default();
        assert!(taps.begin(tap(3, MIN_QUEUE)));
        taps.take(1, Way::Tx, 0, &[1; 90], Payload::Inline(&[2; 300]));
        taps.take(2, Way::Tx, 0, &[1; 90], Payload::Inline(&[2; 300]));
        taps.take(1, Way::Rx, 9, &[3; 90], Payload::Inline(&[]));
        let mut tail = 0;
        assert_eq!(taps.iter().map(|tap| records(tap, &mut tail).len()).sum::<usize>(), 0);
        taps.publish();
        let tap = taps.iter().next().unwrap();
        let found = records(tap, &mut tail);
        let [(first, bytes), (second, _)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((first.way, first.header, first.payload, first.kept), (Way::Tx, 90, 300, 110));
        assert_eq!(*bytes, [&[1; 90][..], &[2; 110]].concat());
        assert_eq!(first.ends, ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()));
        assert_eq!((second.way, second.payload), (Way::Rx, 0));
        assert!(second.ends.1.is_unspecified(), "a peer that is not configured");
    }

    #[test]
    fn a_full_queue_drops_and_counts_and_goes_on_when_there_is_room() {
        let mut taps = Taps::default();
        assert!(taps.begin(tap(0, MIN_QUEUE)));
        let memory = tap(1, MIN_QUEUE);
        let payload = Payload::Ring(&memory.view.rings[1], u64::MAX - 5, 100);
        let each = (56 + 90 + 100) as u64;
        for _ in 0..MIN_QUEUE / each + 5 {
            taps.take(1, Way::Tx, 0, &[1; 90], payload);
        }
        taps.publish();
        let mut tail = 0;
        let tap = taps.iter().next().unwrap();
        assert_eq!(tap.counters()["dropped"]["queue-full"], 5);
        assert_eq!(records(tap, &mut tail).len() as u64, MIN_QUEUE / each);
        taps.take(1, Way::Tx, 0, &[1; 90], payload);
        taps.publish();
        assert_eq!(records(taps.iter().next().unwrap(), &mut tail).len(), 1);
    }

    #[test]
    fn an_index_that_cannot_be_ends_the_capture() {
        let mut taps = Taps::default();
        assert!(taps.begin(tap(0, MIN_QUEUE)));
        let forge = |taps: &Taps, tail| taps.iter().next().unwrap().ring().release(tail);
        forge(&taps, 1);
        taps.take(1, Way::Tx, 0, &[1; 90], Payload::Inline(&[]));
        forge(&taps, 0);
        taps.take(1, Way::Tx, 0, &[1; 90], Payload::Inline(&[]));
        let ended = taps.end(0).unwrap();
        assert_eq!(ended.counters()["dropped"], json!({ "queue-full": 0, "queue-index": 2 }));
        assert_eq!(ended.head, 0);
    }

    #[test]
    fn so_many_and_no_more() {
        let mut taps = Taps::default();
        assert!((0..CAPTURES as u32).all(|tool| taps.begin(tap(tool, MIN_QUEUE))));
        assert!(!taps.begin(tap(9, MIN_QUEUE)));
        assert!(taps.end(9).is_none() && taps.end(1).is_some() && taps.begin(tap(9, MIN_QUEUE)));
        assert!(Tap::new(0, Filter::default(), 1, MIN_QUEUE + 1, vec![]).is_err());
        assert!(Tap::new(0, Filter::default(), 1, MIN_QUEUE / 2, vec![]).is_err());
    }

    #[test]
    fn our_vtep_faces_the_peers() {
        let local = Ipv4Addr::LOCALHOST.into();
        assert_eq!(vteps(Some(Ipv4Addr::UNSPECIFIED.into()), &[local]), [(local, local)]);
        assert_eq!(vteps(Some(Ipv6Addr::LOCALHOST.into()), &[local]), [(local, local)]);
    }
}
