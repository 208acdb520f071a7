//! What the tests share: segments, and ways to spoil them.
#![allow(dead_code, reason = "each test program uses a part")]

use std::ops::Range;

use vsocket_vxlan::lane::OPEN_LEN;
use vsocket_vxlan::{Flags, Segment, Stay, StayOpen, Vni, encapsulate, ethernet, header, ipv4, ipv6, tcp};

/// A segment with data, over IPv4.
pub fn v4() -> Segment {
    Segment {
        vni: Vni::new(0xabcdef).unwrap(),
        src_mac: [2, 0, 0, 0, 0, 1],
        dst_mac: [2, 0, 0, 0, 0, 2],
        src: "192.0.2.1:40000".parse().unwrap(),
        dst: "192.0.2.2:6379".parse().unwrap(),
        seq: 0xffff_fffe,
        ack: 17,
        window: 1 << 20,
        flags: Flags::ACK | Flags::PSH,
        stay: Stay { generation: 3, open: None },
    }
}

/// The same over IPv6.
pub fn v6() -> Segment {
    let (src, dst) = ("[2001:db8::1]:40000".parse().unwrap(), "[2001:db8::2]:6379".parse().unwrap());
    Segment { src, dst, ..v4() }
}

/// The same at the beginning of a stay.
pub fn opening(seg: Segment) -> Segment {
    let open = Some(StayOpen { start: 0x1_ffff_fffe, escape: 0x1b });
    Segment { flags: Flags::SYN | Flags::ACK, stay: Stay { open, ..seg.stay }, ..seg }
}

/// The bytes of a segment and its payload.
pub fn bytes(seg: &Segment, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0xee; seg.header_len() + payload.len()];
    assert_eq!(encapsulate(seg, payload, &mut out), Ok(out.len()));
    out
}

/// Where the IP header begins.
pub const IP: usize = header::HEADER_LEN + ethernet::HEADER_LEN;

/// Where the TCP header begins in a segment over IPv4, and over IPv6.
pub const TCP_V4: usize = IP + ipv4::HEADER_LEN;
/// See [`TCP_V4`].
pub const TCP_V6: usize = IP + ipv6::HEADER_LEN;

/// Where the lane's option lies in an opening segment over IPv4.
pub const LANE_V4: Range<usize> = TCP_V4 + tcp::HEADER_LEN..TCP_V4 + tcp::HEADER_LEN + OPEN_LEN;

/// Puts the IPv4 checksum right.
pub fn fill_ipv4(bytes: &mut [u8]) {
    ipv4::Packet::new_unchecked(&mut bytes[IP..]).fill_checksum();
}

/// Puts a TCP checksum over the rest of the buffer into the header.
pub fn fill_tcp(seg: &Segment, bytes: &mut [u8]) {
    let begin = if seg.src.is_ipv4() { TCP_V4 } else { TCP_V6 };
    tcp::Packet::new_unchecked(&mut bytes[begin..]).fill_checksum(seg.src.ip(), seg.dst.ip());
}
