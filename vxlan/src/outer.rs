//! The headers outside VXLAN: Ethernet, IPv4 or IPv6, UDP (RFC 7348, section 5).
//!
//! Between backends the fabric takes their place. A capture writes them, so that any reader of packets finds what a
//! VTEP would have sent.

use core::net::{IpAddr, SocketAddr};

use crate::ethernet::IpVersion;
use crate::{Error, PROTOCOL_UDP, Segment, ethernet, ipv4, ipv6, udp};

/// The largest header written.
pub const MAX_HEADER_LEN: usize = ethernet::HEADER_LEN + ipv6::HEADER_LEN + udp::HEADER_LEN;

/// What the outer headers of a packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// The sending VTEP's Ethernet address.
    pub src_mac: [u8; 6],
    /// The receiving VTEP's, or the next hop's.
    pub dst_mac: [u8; 6],
    /// The sending VTEP.
    pub src: IpAddr,
    /// The receiving VTEP.
    pub dst: IpAddr,
    /// The UDP source port: one for each flow, see [`source_port`].
    pub src_port: u16,
}

impl Outer {
    /// Length of these headers in bytes.
    pub const fn header_len(&self) -> usize {
        let ip = if self.src.is_ipv4() { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN };
        ethernet::HEADER_LEN + ip + udp::HEADER_LEN
    }

    /// The longest VXLAN packet these headers can announce.
    pub const fn max_payload(&self) -> usize {
        let ip = if self.src.is_ipv4() { ipv4::MAX_PAYLOAD } else { ipv6::MAX_PAYLOAD };
        ip - udp::HEADER_LEN
    }

    /// Writes the headers for a VXLAN packet of `payload_len` bytes at the beginning of `out`; returns their length. The
    /// UDP checksum is 0, as RFC 7348 has it; over IPv6 that is the exception of RFC 6935 for tunnels, and
    /// [`fill_checksum`](Self::fill_checksum) writes a real one for readers that do not make it.
    ///
    /// # Errors
    /// [`Error::FamilyMismatch`], [`Error::PayloadTooLong`], [`Error::BufferTooSmall`]. What `out` holds then is
    /// unspecified.
    pub fn emit(&self, payload_len: usize, out: &mut [u8]) -> Result<usize, Error> {
        if payload_len > self.max_payload() {
            return Err(Error::PayloadTooLong(payload_len));
        }
        let out = out.get_mut(..self.header_len()).ok_or(Error::BufferTooSmall)?;
        let (frame, rest) = out.split_at_mut(ethernet::HEADER_LEN);
        let (ip, udp) = rest.split_at_mut(rest.len() - udp::HEADER_LEN);
        let datagram = udp::HEADER_LEN + payload_len;
        let version = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let repr = ipv4::Repr { src, dst, payload_len: datagram };
                repr.emit_for(&mut ipv4::Packet::new_unchecked(ip), PROTOCOL_UDP)?;
                IpVersion::V4
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let repr = ipv6::Repr { src, dst, payload_len: datagram };
                repr.emit_for(&mut ipv6::Packet::new_unchecked(ip), PROTOCOL_UDP)?;
                IpVersion::V6
            }
            _ => return Err(Error::FamilyMismatch),
        };
        let ethernet = ethernet::Repr { dst: self.dst_mac, src: self.src_mac, version };
        ethernet.emit(&mut ethernet::Packet::new_unchecked(frame));
        let repr = udp::Repr { src_port: self.src_port, dst_port: udp::PORT_VXLAN, payload_len };
        repr.emit(&mut udp::Packet::new_unchecked(udp))?;
        Ok(self.header_len())
    }

    /// Computes and sets the UDP checksum of a whole packet, headers included.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`] if it ends within the headers.
    pub fn fill_checksum(&self, packet: &mut [u8]) -> Result<(), Error> {
        let datagram = self.header_len() - udp::HEADER_LEN..;
        let udp = packet.get_mut(datagram).filter(|udp| udp.len() >= udp::HEADER_LEN);
        udp::Packet::new_unchecked(udp.ok_or(Error::BufferTooSmall)?).fill_checksum(self.src, self.dst);
        Ok(())
    }
}

/// The UDP source port of a flow: a hash of its addresses and ports in the range of RFC 7348, section 5, 49152 to 65535,
/// so that the underlay spreads flows and keeps each on one path.
pub fn source_port(seg: &Segment) -> u16 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for end in [seg.src, seg.dst] {
        match end {
            SocketAddr::V4(end) => hash_into(&mut hash, &end.ip().octets()),
            SocketAddr::V6(end) => hash_into(&mut hash, &end.ip().octets()),
        }
        hash_into(&mut hash, &end.port().to_be_bytes());
    }
    0xc000 | ((hash >> 32 ^ hash) & 0x3fff) as u16
}

/// FNV-1a.
fn hash_into(hash: &mut u64, bytes: &[u8]) {
    for byte in bytes {
        *hash = (*hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::vec::Vec;

    use super::*;
    use crate::{Flags, Stay, Vni};

    fn outer(src: &str, dst: &str) -> Outer {
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        Outer { src_mac: [2, 0, 192, 0, 2, 1], dst_mac: [2, 0, 192, 0, 2, 2], src, dst, src_port: 50000 }
    }

    #[test]
    fn golden_bytes() {
        let mut out = [0xff; MAX_HEADER_LEN];
        let v4 = outer("192.0.2.1", "192.0.2.2");
        assert_eq!(v4.emit(100, &mut out), Ok(42));
        let golden = [
            &[2, 0, 192, 0, 2, 2, 2, 0, 192, 0, 2, 1, 8, 0][..],
            &[0x45, 0, 0, 128, 0, 0, 0x40, 0, 64, 17, 0xb6, 0x69, 192, 0, 2, 1, 192, 0, 2, 2],
            &[0xc3, 0x50, 0x12, 0xb5, 0, 108, 0, 0],
        ]
        .concat();
        assert_eq!(&out[..42], golden);

        let v6 = outer("2001:db8::1", "2001:db8::2");
        assert_eq!(v6.emit(100, &mut out), Ok(62));
        let golden =
            [&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 108, 17, 64, 0x20, 0x01, 0x0d, 0xb8][..], &[0; 11], &[1]];
        assert_eq!(&out[12..38], golden.concat());
        assert_eq!(&out[54..], [0xc3, 0x50, 0x12, 0xb5, 0, 108, 0, 0]);
    }

    #[test]
    fn lengths() {
        let mut out = [0; MAX_HEADER_LEN];
        for (outer, most) in [(outer("192.0.2.1", "192.0.2.2"), 65507), (outer("::1", "::2"), 65527)] {
            assert_eq!(outer.max_payload(), most);
            assert_eq!(outer.emit(most, &mut out), Ok(outer.header_len()));
            assert_eq!(outer.emit(most + 1, &mut out), Err(Error::PayloadTooLong(most + 1)));
            for len in 0..outer.header_len() {
                assert_eq!(outer.emit(0, &mut out[..len]), Err(Error::BufferTooSmall));
                assert_eq!(outer.fill_checksum(&mut out[..len]), Err(Error::BufferTooSmall));
            }
        }
        assert_eq!(outer("::1", "192.0.2.2").emit(0, &mut out), Err(Error::FamilyMismatch));
    }

    #[test]
    fn checksum() {
        for outer in [outer("192.0.2.1", "192.0.2.2"), outer("2001:db8::1", "2001:db8::2")] {
            let mut packet = [7; MAX_HEADER_LEN + 5];
            let len = outer.emit(5, &mut packet).unwrap() + 5;
            outer.fill_checksum(&mut packet[..len]).unwrap();
            let udp = udp::Packet::new_unchecked(&packet[len - 13..len]);
            assert!(udp.checksum() != 0 && udp.verify_checksum(outer.src, outer.dst));
        }
    }

    #[test]
    fn flows_spread_over_the_source_ports() {
        let port = |n: u16| {
            source_port(&Segment {
                vni: Vni::new(1).unwrap(),
                src_mac: [0; 6],
                dst_mac: [0; 6],
                src: SocketAddr::from(([10, 0, 0, 1], n)),
                dst: "10.0.0.2:80".parse().unwrap(),
                seq: u32::from(n),
                ack: 0,
                window: 0,
                flags: Flags::ACK,
                stay: Stay { generation: 1, open: None },
            })
        };
        let ports: Vec<_> = (0..1000).map(port).collect();
        assert!(ports.iter().all(|port| *port >= 49152));
        assert_eq!(port(7), ports[7]);
        assert!(ports.iter().collect::<HashSet<_>>().len() > 900);
    }
}
