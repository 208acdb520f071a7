//! Each reason to refuse a segment, reached by the one corruption it is named for.

mod common;

use std::collections::HashSet;

use common::*;
use vsocket_vxlan::lane::PLAIN_LEN;
use vsocket_vxlan::{
    Error, Flags, MAX_PAYLOAD, PayloadAt, Segment, Vni, decapsulate, encapsulate, ipv4, ipv6, tcp,
};

/// What decapsulation says of an inline segment with the payload "data" after `spoil` has changed its bytes.
fn spoiled(seg: Segment, spoil: impl FnOnce(&mut Vec<u8>)) -> Error {
    let mut bytes = bytes(&seg, b"data");
    spoil(&mut bytes);
    decapsulate(&bytes, PayloadAt::Inline).unwrap_err()
}

fn spoiled_ipv4(spoil: impl FnOnce(&mut ipv4::Packet<&mut [u8]>)) -> Error {
    spoiled(v4(), |bytes| {
        spoil(&mut ipv4::Packet::new_unchecked(&mut bytes[IP..]));
        fill_ipv4(bytes);
    })
}

fn spoiled_ipv6(spoil: impl FnOnce(&mut ipv6::Packet<&mut [u8]>)) -> Error {
    spoiled(v6(), |bytes| spoil(&mut ipv6::Packet::new_unchecked(&mut bytes[IP..])))
}

fn spoiled_tcp(spoil: impl FnOnce(&mut tcp::Packet<&mut [u8]>)) -> Error {
    spoiled(v4(), |bytes| spoil(&mut tcp::Packet::new_unchecked(&mut bytes[TCP_V4..])))
}

/// One byte of the option of an opening segment changed.
fn spoiled_lane(index: usize, value: u8) -> Error {
    spoiled(opening(v4()), |bytes| bytes[LANE_V4][index] = value)
}

/// An opening segment turned into one with the short option; its second half is overwritten with `tail`.
fn short_lane(flags: Flags, tail: [u8; 8]) -> Error {
    spoiled(opening(v4()), |bytes| {
        tcp::Packet::new_unchecked(&mut bytes[TCP_V4..]).set_control_bits(flags.bits());
        let lane = &mut bytes[LANE_V4];
        (lane[1], lane[7]) = (PLAIN_LEN as u8, 0);
        lane[PLAIN_LEN..].copy_from_slice(&tail);
    })
}

/// What encapsulation says.
fn refused(seg: Segment, payload: &[u8], room: usize) -> Error {
    encapsulate(&seg, payload, &mut vec![0; room]).unwrap_err()
}

/// A header alone, given with `payload` after it.
fn elsewhere(checksum: u16, after: &[u8]) -> Error {
    let mut bytes = bytes(&v4(), b"data");
    bytes.truncate(v4().header_len());
    tcp::Packet::new_unchecked(&mut bytes[TCP_V4..]).set_checksum(checksum);
    bytes.extend_from_slice(after);
    decapsulate(&bytes, PayloadAt::Elsewhere).unwrap_err()
}

/// Each variant beside a way to reach it.
fn table() -> Vec<(Error, Error)> {
    let cut = |seg, len| spoiled(seg, |bytes| bytes.truncate(len));
    let lane_twice = |bytes: &mut Vec<u8>| {
        let option = bytes[LANE_V4.start..][..PLAIN_LEN].to_vec();
        bytes.splice(LANE_V4.start..LANE_V4.start, option);
        tcp::Packet::new_unchecked(&mut bytes[TCP_V4..]).set_data_offset_and_reserved(11, 0);
    };
    vec![
        (Error::VxlanTruncated, cut(v4(), 7)),
        (Error::VxlanNoVni, spoiled(v4(), |bytes| bytes[0] = 0)),
        (Error::VxlanReserved, spoiled(v4(), |bytes| bytes[7] = 1)),
        (Error::VniTooLarge(1 << 24), Vni::new(1 << 24).unwrap_err()),
        (Error::EthernetTruncated, cut(v4(), IP - 1)),
        (Error::EthernetTagged, spoiled(v4(), |bytes| bytes[20..22].copy_from_slice(&[0x81, 0]))),
        (Error::EthernetUnknownType(0x0806), spoiled(v4(), |bytes| bytes[21] = 6)),
        (Error::Ipv4Truncated, cut(v4(), TCP_V4 - 1)),
        (Error::Ipv4Version(6), spoiled_ipv4(|ip| ip.set_version_and_words(6, 5))),
        (Error::Ipv4HeaderLength(4), spoiled_ipv4(|ip| ip.set_version_and_words(4, 4))),
        (Error::Ipv4Options, spoiled_ipv4(|ip| ip.set_version_and_words(4, 6))),
        (Error::Ipv4Checksum, spoiled(v4(), |bytes| bytes[IP + 10] ^= 1)),
        (Error::Ipv4TotalLength(19), spoiled_ipv4(|ip| ip.set_total_len(19))),
        (Error::Ipv4ReservedFlag, spoiled_ipv4(|ip| ip.set_flags_and_offset(ipv4::FLAG_RESERVED))),
        (Error::Ipv6Truncated, cut(v6(), TCP_V6 - 1)),
        (Error::Ipv6Version(4), spoiled_ipv6(|ip| ip.set_version_class_flow(4, 0, 0))),
        (Error::Ipv6Extension(0), spoiled_ipv6(|ip| ip.set_next_header(0))),
        (Error::Fragmented, spoiled_ipv4(|ip| ip.set_flags_and_offset(ipv4::FLAG_MORE_FRAGMENTS))),
        (Error::Fragmented, spoiled_ipv6(|ip| ip.set_next_header(44))),
        (Error::NotTcp(17), spoiled_ipv4(|ip| ip.set_protocol(17))),
        (Error::NotTcp(58), spoiled_ipv6(|ip| ip.set_next_header(58))),
        (Error::TcpTruncated, cut(v4(), TCP_V4 + 31)),
        (Error::TcpDataOffset(4), spoiled_tcp(|tcp| tcp.set_data_offset_and_reserved(4, 0))),
        (Error::TcpReserved, spoiled_tcp(|tcp| tcp.set_data_offset_and_reserved(8, 8))),
        (Error::TcpControlBits(0x90), spoiled_tcp(|tcp| tcp.set_control_bits(0x90))),
        (Error::TcpUrgent, spoiled_tcp(|tcp| tcp.set_urgent(1))),
        (Error::SynFin, spoiled_tcp(|tcp| tcp.set_control_bits(0x13))),
        (Error::SynRst, refused(Segment { flags: Flags::SYN | Flags::RST, ..v4() }, b"", 200)),
        (Error::TcpChecksum, spoiled_tcp(|tcp| tcp.set_checksum(1))),
        (Error::TcpChecksumUnverifiable, elsewhere(1, b"")),
        (Error::OptionLength(1), spoiled_lane(1, 1)),
        (Error::OptionPadding, short_lane(Flags::ACK, [0, 0, 0, 0, 0, 0, 0, 1])),
        (Error::LaneMissing, spoiled_lane(2, b'x')),
        (Error::LaneTwice, spoiled(v4(), lane_twice)),
        (Error::LaneLength(16), spoiled_lane(1, 16)),
        (Error::LaneVersion(2), spoiled_lane(6, 2)),
        (Error::LaneReserved, spoiled(v4(), |bytes| bytes[LANE_V4.start + 7] = 1)),
        (Error::LaneOpenMissing, short_lane(Flags::SYN, [1; 8])),
        (Error::LaneOpenWithoutSyn, refused(Segment { flags: Flags::ACK, ..opening(v6()) }, b"", 200)),
        (Error::LengthTooShort, spoiled_ipv4(|ip| ip.set_total_len(51))),
        (Error::LengthTooShort, spoiled_ipv6(|ip| ip.set_payload_len(31))),
        (Error::PayloadTruncated, spoiled_ipv4(|ip| ip.set_total_len(57))),
        (Error::PayloadTruncated, cut(v6(), v6().header_len() + 3)),
        (Error::PayloadTrailing, spoiled_ipv4(|ip| ip.set_total_len(55))),
        (Error::PayloadTrailing, spoiled(v6(), |bytes| bytes.push(0))),
        (Error::PayloadUnexpected, elsewhere(0, b"d")),
        (Error::PayloadTooLong(65503), spoiled_ipv6(|ip| ip.set_payload_len(65535))),
        (Error::PayloadTooLong(MAX_PAYLOAD + 1), refused(v4(), &[0; MAX_PAYLOAD + 1], 70000)),
        (Error::FamilyMismatch, refused(Segment { src: v6().src, ..v4() }, b"", 200)),
        (Error::BufferTooSmall, refused(v4(), b"data", v4().header_len() + 3)),
    ]
}

#[test]
fn each_corruption_has_its_name() {
    for (expected, found) in table() {
        assert_eq!(found, expected);
    }
}

/// The names of the variants, from the source: a new one must come with a line in the table.
#[test]
fn every_variant_is_in_the_table() {
    let name = |text: &str| text.split(['(', ',', ' ']).next().unwrap().to_owned();
    let reached: HashSet<_> = table().iter().map(|(error, _)| name(&format!("{error:?}"))).collect();
    let source = include_str!("../src/error.rs");
    let body = source.split("pub enum Error {").nth(1).unwrap().split("\n}").next().unwrap();
    let variants = body.lines().map(str::trim).filter(|line| line.ends_with(',') && !line.starts_with("//"));
    assert_eq!(variants.map(name).collect::<HashSet<_>>(), reached);
}

#[test]
fn every_variant_has_a_text_of_its_own() {
    let errors: HashSet<_> = table().into_iter().map(|(error, _)| error).collect();
    let texts: HashSet<_> = errors.iter().map(Error::to_string).collect();
    assert_eq!(texts.len(), errors.len());
    assert!(!texts.contains("segment refused"));
}
