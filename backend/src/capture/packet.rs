//! From a record to packets as a VTEP would have sent them.
//!
//! What differs from the segment between the backends, so that any reader of TCP understands it:
//!
//! - Outer Ethernet, IP and UDP are added. The MACs are made up from the VTEPs' addresses.
//! - The inner TCP checksum is computed, where the payload was kept whole.
//! - A SYN has the sequence number before the stay's first byte, as in TCP it takes one; on a lane it takes none. The
//!   lane's option says where the stay begins, in all 64 bits.
//! - A segment that is too long for one packet is cut into several, as segmentation offload would cut it.

#![forbid(unsafe_code)]

use std::net::IpAddr;

use vsocket_vxlan::outer::{MAX_HEADER_LEN as MAX_OUTER_LEN, source_port};
use vsocket_vxlan::{
    Error, Flags, MAX_HEADER_LEN, MAX_PAYLOAD, Outer, PayloadAt, Segment, decapsulate, encapsulate_header,
    encapsulate_summed,
};

use super::{Record, Way};

/// Builds packets, in memory that it keeps.
#[derive(Debug)]
pub struct Builder {
    snaplen: usize,
    out: Box<[u8]>,
}

impl Builder {
    /// For packets of which at most `snaplen` bytes are wanted.
    pub fn new(snaplen: u32) -> Self {
        let out = vec![0; MAX_OUTER_LEN + MAX_HEADER_LEN + MAX_PAYLOAD].into();
        Self { snaplen: snaplen as usize, out }
    }

    /// Gives `each` the packets of a record, one after the other: what is kept of it, and its true length. `segment`: the
    /// header, and the payload as far as it was kept.
    ///
    /// # Errors
    ///
    /// Those of `each`; [`Error`] if the header is not a segment's.
    pub fn packets<E: From<Error>>(
        &mut self,
        record: &Record,
        segment: &[u8],
        mut each: impl FnMut(&[u8], usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let (header, kept) = segment.split_at_checked(record.header).ok_or(Error::PayloadTruncated)?;
        let (whole, header_len, len) = decapsulate(header, PayloadAt::Elsewhere)?;
        let outer = outer(record, &whole);
        let most = outer.max_payload() - header_len;
        let mut at = 0;
        loop {
            let piece = most.min(len - at);
            let last = at + piece == len;
            let present = kept.get(at..).map_or(&[][..], |rest| &rest[..piece.min(rest.len())]);
            let (kept, whole_len) = self.packet(&outer, &cut(&whole, at, last), piece, present)?;
            each(&self.out[..kept.min(self.snaplen)], whole_len)?;
            at += piece;
            if last {
                return Ok(());
            }
        }
    }

    /// One packet: bytes of it that are there, and its length.
    fn packet(
        &mut self,
        outer: &Outer,
        segment: &Segment,
        len: usize,
        present: &[u8],
    ) -> Result<(usize, usize), Error> {
        let inner_len = segment.header_len() + len;
        let outer_len = outer.emit(inner_len, &mut self.out)?;
        let inner = &mut self.out[outer_len..];
        let whole_len = outer_len + inner_len;
        if present.len() == len {
            encapsulate_summed(segment, present, inner)?;
            if outer.src.is_ipv6() {
                outer.fill_checksum(&mut self.out[..whole_len])?;
            }
            return Ok((whole_len, whole_len));
        }
        let header_len = encapsulate_header(segment, len, inner)?;
        inner[header_len..header_len + present.len()].copy_from_slice(present);
        Ok((outer_len + header_len + present.len(), whole_len))
    }
}

fn outer(record: &Record, segment: &Segment) -> Outer {
    let (own, peer) = record.ends;
    let (src, dst) = if record.way == Way::Tx { (own, peer) } else { (peer, own) };
    Outer { src_mac: mac(src), dst_mac: mac(dst), src, dst, src_port: source_port(segment) }
}

/// A locally administered MAC that tells hosts apart.
fn mac(ip: IpAddr) -> [u8; 6] {
    let [a, b, c, d] = match ip {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(ip) => (ip.to_bits() as u32).to_be_bytes(),
    };
    [2, 0, a, b, c, d]
}

/// The segment of a piece that begins `at` bytes after the whole one's payload.
fn cut(whole: &Segment, at: usize, last: bool) -> Segment {
    let mut segment = *whole;
    segment.seq = whole.seq.wrapping_add(at as u32);
    if whole.flags.contains(Flags::SYN) {
        segment.seq = segment.seq.wrapping_sub(1);
    }
    if !last {
        // What ends something stands in the last packet.
        let mut flags = Flags::empty();
        for flag in [Flags::SYN, Flags::ACK] {
            if whole.flags.contains(flag) {
                flags |= flag;
            }
        }
        segment.flags = flags;
    }
    segment
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vsocket_vxlan::{Stay, StayOpen, Vni};

    use super::*;

    fn segment(flags: Flags, open: Option<StayOpen>) -> Segment {
        Segment {
            vni: Vni::new(100).unwrap(),
            src_mac: [2, 0, 0, 100, 0, 1],
            dst_mac: [2, 0, 0, 100, 0, 3],
            src: "198.51.100.1:4000".parse().unwrap(),
            dst: "198.51.100.3:80".parse().unwrap(),
            seq: 7000,
            ack: 1,
            window: 1 << 20,
            flags,
            stay: Stay { generation: 1, open },
        }
    }

    fn build(
        segment: &Segment,
        payload: &[u8],
        kept: usize,
        snaplen: u32,
        ends: [&str; 2],
    ) -> Vec<(Vec<u8>, usize)> {
        let mut bytes = vec![0; MAX_HEADER_LEN];
        let header = encapsulate_header(segment, payload.len(), &mut bytes).unwrap();
        bytes.truncate(header);
        bytes.extend_from_slice(&payload[..kept]);
        let [own, peer] = ends.map(|end| end.parse().unwrap());
        let (time, payload) = (Duration::ZERO, payload.len());
        let record = Record { way: Way::Rx, header, payload, kept, time, ends: (own, peer) };
        let mut packets = Vec::new();
        Builder::new(snaplen)
            .packets(&record, &bytes, |packet, len| {
                packets.push((packet.to_vec(), len));
                Ok::<_, Error>(())
            })
            .unwrap();
        packets
    }

    const V4: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
    const V6: [&str; 2] = ["2001:db8::1", "2001:db8::2"];

    #[test]
    fn one_packet_with_every_checksum() {
        let sent = segment(Flags::PSH | Flags::ACK, None);
        for (ends, outer) in [(V4, 42), (V6, 62)] {
            let packets = build(&sent, b"hello", 5, 65535, ends);
            let [(packet, len)] = &packets[..] else { panic!("{} packets", packets.len()) };
            assert_eq!((packet.len(), *len), (outer + 74 + 5, outer + 74 + 5));
            assert_eq!(decapsulate(&packet[outer..], PayloadAt::Inline), Ok((sent, 74, 5)));
            assert_ne!(packet[outer + 58..outer + 60], [0, 0], "a checksum that is computed");
        }
        let (packet, _) = &build(&sent, b"hello", 5, 65535, V4)[0];
        assert_eq!(packet[..12], [2, 0, 192, 0, 2, 1, 2, 0, 192, 0, 2, 2], "received: from the peer");
    }

    #[test]
    fn what_does_not_fit_one_packet_is_cut() {
        let payload: Vec<u8> = (0..MAX_PAYLOAD).map(|n| ((n / 256) ^ n) as u8).collect();
        let sent = segment(Flags::PSH | Flags::ACK | Flags::FIN, None);
        let packets = build(&sent, &payload, payload.len(), 1 << 18, V4);
        assert_eq!(packets.len(), 2);
        let (mut found, mut next) = (Vec::new(), sent.seq);
        for (n, (packet, len)) in packets.iter().enumerate() {
            assert!(packet.len() == *len && packet.len() - 14 <= 65535);
            let (read, header, len) = decapsulate(&packet[42..], PayloadAt::Inline).unwrap();
            assert_eq!((read.seq, read.flags), (next, if n == 1 { sent.flags } else { Flags::ACK }));
            found.extend_from_slice(&packet[42 + header..]);
            next = next.wrapping_add(len as u32);
        }
        assert!(found == payload);
    }

    #[test]
    fn a_syn_takes_a_number_here() {
        let open = StayOpen { start: 7000, escape: 3 };
        let sent = segment(Flags::SYN, Some(open));
        let (packet, _) = &build(&sent, b"", 0, 65535, V4)[0];
        assert_eq!(decapsulate(&packet[42..], PayloadAt::Inline), Ok((Segment { seq: 6999, ..sent }, 82, 0)));
    }

    #[test]
    fn what_was_not_kept_is_only_announced() {
        let sent = segment(Flags::ACK, None);
        let packets = build(&sent, &[5; 1000], 10, 1 << 18, V4);
        assert_eq!((packets[0].0.len(), packets[0].1), (42 + 74 + 10, 42 + 74 + 1000));
        assert_eq!(packets[0].0[42 + 58..42 + 60], [0, 0], "no checksum of what is not known");
        let packets = build(&sent, &[5; 1000], 10, 60, V6);
        assert_eq!((packets[0].0.len(), packets[0].1), (60, 62 + 74 + 1000));
        // What is left of two packets.
        let packets = build(&sent, &vec![5; MAX_PAYLOAD], 10, 1 << 18, V4);
        assert_eq!((packets.len(), packets[1].0.len()), (2, 42 + 74));
    }
}
