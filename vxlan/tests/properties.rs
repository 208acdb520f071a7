//! What holds of every segment, and of any bytes whatsoever.

mod common;

use std::net::{IpAddr, SocketAddr};

use common::*;
use proptest::prelude::*;
use vsocket_vxlan::{
    Error, Flags, MAX_HEADER_LEN, MAX_PAYLOAD, MAX_WINDOW, PayloadAt, Segment, Stay, StayOpen, Vni,
    WINDOW_SHIFT, decapsulate, encapsulate_header,
};

fn addresses() -> impl Strategy<Value = (IpAddr, IpAddr)> {
    prop_oneof![
        any::<([u8; 4], [u8; 4])>().prop_map(|(src, dst)| (src.into(), dst.into())),
        any::<([u8; 16], [u8; 16])>().prop_map(|(src, dst)| (src.into(), dst.into())),
    ]
}

fn flags_and_stay() -> impl Strategy<Value = (Flags, Stay)> {
    let open = any::<(u64, u8)>().prop_map(|(start, escape)| StayOpen { start, escape });
    let flags = (0..0x20_u8).prop_filter_map("has no meaning", |bits| Flags::from_bits(bits).ok());
    (flags, any::<u32>(), open).prop_map(|(flags, generation, open)| {
        (flags, Stay { generation, open: flags.contains(Flags::SYN).then_some(open) })
    })
}

/// Any segment that can be written.
fn segment() -> impl Strategy<Value = Segment> {
    let frame = (0..=Vni::MAX.number(), any::<[u8; 6]>(), any::<[u8; 6]>());
    let numbers = any::<(u16, u16, u32, u32, u32)>();
    (frame, addresses(), numbers, flags_and_stay()).prop_map(
        |((vni, src_mac, dst_mac), (src, dst), (src_port, dst_port, seq, ack, window), (flags, stay))| {
            let vni = Vni::new(vni).unwrap();
            let (src, dst) = (SocketAddr::new(src, src_port), SocketAddr::new(dst, dst_port));
            Segment { vni, src_mac, dst_mac, src, dst, seq, ack, window, flags, stay }
        },
    )
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..300)
}

/// The segment as its reader sees it: its window rounded to what the field can say.
fn as_read(seg: Segment) -> Segment {
    Segment { window: seg.window.min(MAX_WINDOW) >> WINDOW_SHIFT << WINDOW_SHIFT, ..seg }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn a_segment_reads_as_it_was_written(seg in segment(), payload in payload()) {
        let bytes = bytes(&seg, &payload);
        let header_len = seg.header_len();
        let read = decapsulate(&bytes, PayloadAt::Inline);
        prop_assert_eq!(read, Ok((as_read(seg), header_len, payload.len())));
        prop_assert_eq!(&bytes[header_len..], &payload[..]);
    }

    #[test]
    fn a_header_reads_as_it_was_written(seg in segment(), payload_len in 0..=MAX_PAYLOAD) {
        let mut out = [0xee; MAX_HEADER_LEN];
        let header_len = encapsulate_header(&seg, payload_len, &mut out).unwrap();
        prop_assert!(out[header_len..].iter().all(|&byte| byte == 0xee));
        let read = decapsulate(&out[..header_len], PayloadAt::Elsewhere);
        prop_assert_eq!(read, Ok((as_read(seg), header_len, payload_len)));
    }

    #[test]
    fn what_was_read_is_written_again_the_same(seg in segment(), payload in payload()) {
        let first = bytes(&seg, &payload);
        let (read, ..) = decapsulate(&first, PayloadAt::Inline).unwrap();
        prop_assert_eq!(bytes(&read, &payload), first);
    }

    #[test]
    fn every_truncation_is_noticed(seg in segment(), payload in payload()) {
        let bytes = bytes(&seg, &payload);
        for len in 0..bytes.len() {
            let error = decapsulate(&bytes[..len], PayloadAt::Inline).unwrap_err();
            let tcp = if seg.src.is_ipv4() { TCP_V4 } else { TCP_V6 };
            let ip = if seg.src.is_ipv4() { Error::Ipv4Truncated } else { Error::Ipv6Truncated };
            let expected = match len {
                0..8 => Error::VxlanTruncated,
                8..IP => Error::EthernetTruncated,
                _ if len < tcp => ip,
                _ if len < seg.header_len() => Error::TcpTruncated,
                _ => Error::PayloadTruncated,
            };
            prop_assert_eq!(error, expected, "cut to {} bytes", len);
        }
    }

    #[test]
    fn with_a_checksum_every_flipped_tcp_bit_is_noticed(
        seg in segment(), payload in payload(), place in any::<prop::sample::Index>(), bit in 0..8
    ) {
        let mut bytes = bytes(&seg, &payload);
        fill_tcp(&seg, &mut bytes);
        prop_assert_eq!(decapsulate(&bytes, PayloadAt::Inline).map(|read| read.0), Ok(as_read(seg)));
        let begin = if seg.src.is_ipv4() { TCP_V4 } else { TCP_V6 };
        let place = begin + place.index(bytes.len() - begin);
        bytes[place] ^= 1_u8 << bit;
        // A flip can turn the checksum itself into 0, "not computed".
        prop_assume!(bytes[begin + 16..begin + 18] != [0, 0]);
        prop_assert!(decapsulate(&bytes, PayloadAt::Inline).is_err());
    }

    #[test]
    fn mutations_never_panic(
        seg in segment(),
        payload in payload(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        len in any::<prop::sample::Index>(),
        fix in any::<bool>(),
    ) {
        let mut bytes = bytes(&seg, &payload);
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if fix && seg.src.is_ipv4() {
            fill_ipv4(&mut bytes);
        }
        check(&bytes);
        check(&bytes[..len.index(bytes.len())]);
    }

    #[test]
    fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check(&bytes);
    }
}

/// Reads bytes both ways. What is accepted is within bounds, and can be written and read again.
fn check(buf: &[u8]) {
    for at in [PayloadAt::Inline, PayloadAt::Elsewhere] {
        let Ok((seg, header_len, payload_len)) = decapsulate(buf, at) else { continue };
        let present = if at == PayloadAt::Inline { payload_len } else { 0 };
        assert_eq!(header_len + present, buf.len());
        assert!(payload_len <= MAX_PAYLOAD);
        let mut out = [0; MAX_HEADER_LEN];
        let written = encapsulate_header(&seg, payload_len, &mut out).unwrap();
        let again = decapsulate(&out[..written], PayloadAt::Elsewhere);
        assert_eq!(again, Ok((seg, written, payload_len)));
    }
}
