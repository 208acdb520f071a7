//! Whole segments: what a backend says to another, to bytes and back.
//!
//! ```text
//! | VXLAN 8 | Ethernet 14 | IPv4 20 or IPv6 40 | TCP 20 | lane option 12 or 20 | payload |
//! ```
//!
//! The payload either follows its header or has gone ahead by RDMA WRITE; the header is the same, and its IP
//! length counts the payload in both cases.

use core::net::{IpAddr, SocketAddr};

use crate::ethernet::IpVersion;
use crate::lane::Stay;
use crate::tcp::Flags;
use crate::{Error, Vni, ethernet, header, ipv4, ipv6, tcp};

/// The largest header written.
pub const MAX_HEADER_LEN: usize =
    header::HEADER_LEN + ethernet::HEADER_LEN + ipv6::HEADER_LEN + tcp::MAX_HEADER_LEN;

/// The largest payload of a segment, with either IP version and any header: what the 16-bit total length of IPv4
/// (RFC 791, section 3.1) leaves after the longest TCP header.
pub const MAX_PAYLOAD: usize = ipv4::MAX_PAYLOAD - tcp::MAX_HEADER_LEN;

/// What a segment between two backends says.
///
/// Both addresses must be of one IP version; a mapped IPv4 address is an IPv6 address. The flow label and the
/// scope of an IPv6 [`SocketAddr`] are not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The tenant's network (RFC 7348, section 5).
    pub vni: Vni,
    /// The sending guest's Ethernet address.
    pub src_mac: [u8; 6],
    /// The receiving guest's Ethernet address.
    pub dst_mac: [u8; 6],
    /// The sending guest's address and port.
    pub src: SocketAddr,
    /// The receiving guest's address and port.
    pub dst: SocketAddr,
    /// The low 32 bits of the payload's offset in the stream. Neither SYN nor FIN takes a number.
    pub seq: u32,
    /// The low 32 bits of the offset up to which the other stream has been received.
    pub ack: u32,
    /// How many bytes more may come. Carried in units of `1 << WINDOW_SHIFT` bytes: rounded down, and at most
    /// [`MAX_WINDOW`](crate::MAX_WINDOW).
    pub window: u32,
    /// The control bits (RFC 9293, section 3.1). FIN: the stream ends at `seq` plus the payload's length.
    pub flags: Flags,
    /// The stay this segment belongs to; opened in a segment with SYN, and in no other.
    pub stay: Stay,
}

/// Where the payload of a segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadAt {
    /// In the buffer, after the header.
    Inline,
    /// Not in the buffer: it went ahead by RDMA WRITE.
    Elsewhere,
}

impl Segment {
    /// Length of this segment's header in bytes.
    pub fn header_len(&self) -> usize {
        let ip = if self.src.is_ipv4() { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN };
        header::HEADER_LEN + ethernet::HEADER_LEN + ip + self.tcp().header_len()
    }

    fn tcp(&self) -> tcp::Repr {
        tcp::Repr {
            src_port: self.src.port(),
            dst_port: self.dst.port(),
            seq: self.seq,
            ack: self.ack,
            window: self.window,
            flags: self.flags,
            stay: self.stay,
        }
    }
}

/// Writes the header for a payload of `payload_len` bytes that follows or has gone ahead, at the beginning of
/// `out`. Returns the header's length.
///
/// # Errors
/// [`Error::FamilyMismatch`], [`Error::PayloadTooLong`], [`Error::BufferTooSmall`], and those of
/// [`tcp::Repr::emit`]. What `out` holds then is unspecified.
pub fn encapsulate_header(seg: &Segment, payload_len: usize, out: &mut [u8]) -> Result<usize, Error> {
    if payload_len > MAX_PAYLOAD {
        return Err(Error::PayloadTooLong(payload_len));
    }
    let tcp = seg.tcp();
    let ip_payload_len = tcp.header_len() + payload_len;
    match (seg.src.ip(), seg.dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let (ip, rest) = split::<{ ipv4::HEADER_LEN }>(emit_frame(seg, IpVersion::V4, out)?)?;
            let repr = ipv4::Repr { src, dst, payload_len: ip_payload_len };
            repr.emit(&mut ipv4::Packet::new_unchecked(ip))?;
            emit_tcp(&tcp, rest)?;
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let (ip, rest) = split::<{ ipv6::HEADER_LEN }>(emit_frame(seg, IpVersion::V6, out)?)?;
            let repr = ipv6::Repr { src, dst, payload_len: ip_payload_len };
            repr.emit(&mut ipv6::Packet::new_unchecked(ip))?;
            emit_tcp(&tcp, rest)?;
        }
        _ => return Err(Error::FamilyMismatch),
    }
    Ok(seg.header_len())
}

/// Writes header and payload at the beginning of `out`. Returns the length of both.
///
/// # Errors
/// As [`encapsulate_header`].
pub fn encapsulate(seg: &Segment, payload: &[u8], out: &mut [u8]) -> Result<usize, Error> {
    let header_len = encapsulate_header(seg, payload.len(), out)?;
    let len = header_len + payload.len();
    out.get_mut(header_len..len).ok_or(Error::BufferTooSmall)?.copy_from_slice(payload);
    Ok(len)
}

/// As [`encapsulate`], with the TCP checksum computed: for a reader that is no backend.
///
/// # Errors
/// As [`encapsulate_header`].
pub fn encapsulate_summed(seg: &Segment, payload: &[u8], out: &mut [u8]) -> Result<usize, Error> {
    let len = encapsulate(seg, payload, out)?;
    let tcp = seg.header_len() - seg.tcp().header_len();
    tcp::Packet::new_unchecked(&mut out[tcp..len]).fill_checksum(seg.src.ip(), seg.dst.ip());
    Ok(len)
}

/// Reads a segment, or a header whose payload is elsewhere, from a buffer that holds it and nothing more. Returns
/// the segment, the header's length and the payload's, which is at most [`MAX_PAYLOAD`].
///
/// # Errors
/// Those of each layer's `parse`, from the outside in; then, of several, the first of
/// [`Error::LengthTooShort`], [`Error::PayloadTooLong`], [`Error::PayloadTruncated`],
/// [`Error::PayloadTrailing`], [`Error::PayloadUnexpected`], [`Error::TcpChecksum`],
/// [`Error::TcpChecksumUnverifiable`].
pub fn decapsulate(buf: &[u8], payload: PayloadAt) -> Result<(Segment, usize, usize), Error> {
    let vxlan = header::Repr::parse(&header::Packet::new_unchecked(buf))?;
    let frame = &buf[header::HEADER_LEN..];
    let ethernet = ethernet::Repr::parse(&ethernet::Packet::new_unchecked(frame))?;
    let ip = Ip::parse(ethernet.version, &frame[ethernet::HEADER_LEN..])?;
    let packet = tcp::Packet::new_unchecked(ip.rest);
    let tcp = tcp::Repr::parse(&packet)?;

    let payload_len = ip.payload_len.checked_sub(packet.header_len()).ok_or(Error::LengthTooShort)?;
    if payload_len > MAX_PAYLOAD {
        return Err(Error::PayloadTooLong(payload_len));
    }
    let present = ip.rest.len() - packet.header_len();
    check_presence(payload, payload_len, present)?;
    if packet.checksum() != 0 {
        check_sum(&packet, &ip, present == payload_len)?;
    }

    let segment = Segment {
        vni: vxlan.vni,
        src_mac: ethernet.src,
        dst_mac: ethernet.dst,
        src: SocketAddr::new(ip.src, tcp.src_port),
        dst: SocketAddr::new(ip.dst, tcp.dst_port),
        seq: tcp.seq,
        ack: tcp.ack,
        window: tcp.window,
        flags: tcp.flags,
        stay: tcp.stay,
    };
    Ok((segment, buf.len() - present, payload_len))
}

/// The part of both IP versions' headers that a segment needs, and what follows them.
struct Ip<'a> {
    src: IpAddr,
    dst: IpAddr,
    payload_len: usize,
    rest: &'a [u8],
}

impl<'a> Ip<'a> {
    fn parse(version: IpVersion, buf: &'a [u8]) -> Result<Ip<'a>, Error> {
        Ok(match version {
            IpVersion::V4 => {
                let ipv4::Repr { src, dst, payload_len } =
                    ipv4::Repr::parse(&ipv4::Packet::new_unchecked(buf))?;
                Ip { src: src.into(), dst: dst.into(), payload_len, rest: &buf[ipv4::HEADER_LEN..] }
            }
            IpVersion::V6 => {
                let ipv6::Repr { src, dst, payload_len } =
                    ipv6::Repr::parse(&ipv6::Packet::new_unchecked(buf))?;
                Ip { src: src.into(), dst: dst.into(), payload_len, rest: &buf[ipv6::HEADER_LEN..] }
            }
        })
    }
}

/// Whether as much payload is present as must be.
fn check_presence(payload: PayloadAt, announced: usize, present: usize) -> Result<(), Error> {
    match payload {
        PayloadAt::Inline if present < announced => Err(Error::PayloadTruncated),
        PayloadAt::Inline if present > announced => Err(Error::PayloadTrailing),
        PayloadAt::Elsewhere if present > 0 => Err(Error::PayloadUnexpected),
        _ => Ok(()),
    }
}

/// Whether a TCP checksum that was computed is right.
fn check_sum(packet: &tcp::Packet<&[u8]>, ip: &Ip<'_>, whole: bool) -> Result<(), Error> {
    if !whole {
        return Err(Error::TcpChecksumUnverifiable);
    }
    if packet.verify_checksum(ip.src, ip.dst) { Ok(()) } else { Err(Error::TcpChecksum) }
}

/// Writes the headers outside IP; returns what follows them.
fn emit_frame<'a>(seg: &Segment, version: IpVersion, out: &'a mut [u8]) -> Result<&'a mut [u8], Error> {
    let (vxlan, rest) = split::<{ header::HEADER_LEN }>(out)?;
    let (frame, rest) = split::<{ ethernet::HEADER_LEN }>(rest)?;
    header::Repr { vni: seg.vni }.emit(&mut header::Packet::new_unchecked(vxlan));
    ethernet::Repr { dst: seg.dst_mac, src: seg.src_mac, version }
        .emit(&mut ethernet::Packet::new_unchecked(frame));
    Ok(rest)
}

fn emit_tcp(tcp: &tcp::Repr, out: &mut [u8]) -> Result<(), Error> {
    let header = out.get_mut(..tcp.header_len()).ok_or(Error::BufferTooSmall)?;
    tcp.emit(&mut tcp::Packet::new_unchecked(header))
}

/// The first `N` bytes, as an array (so that the compiler can see that no field is out of bounds), and the rest.
fn split<const N: usize>(out: &mut [u8]) -> Result<(&mut [u8; N], &mut [u8]), Error> {
    out.split_first_chunk_mut().ok_or(Error::BufferTooSmall)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::lane::StayOpen;

    const MACS: [u8; 12] = [2, 0, 0, 0, 0, 0x5c, 2, 0, 0, 0, 0, 0xd5];

    fn segment(src: &str, dst: &str, flags: Flags, open: Option<StayOpen>) -> Segment {
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        let vni = Vni::new(0x123456).unwrap();
        let [src_mac, dst_mac] = [&MACS[..6], &MACS[6..]].map(|mac| mac.try_into().unwrap());
        let stay = Stay { generation: 7, open };
        Segment { vni, src_mac, dst_mac, src, dst, seq: 0x1000, ack: 0x2000, window: 0x8400, flags, stay }
    }

    fn v4() -> Segment {
        segment("10.0.0.1:40000", "10.0.0.2:6379", Flags::PSH | Flags::ACK, None)
    }

    fn v6() -> Segment {
        let open = StayOpen { start: 0x1_0000_1000, escape: 0x1b };
        segment("[fd00::1]:40000", "[fd00::2]:6379", Flags::SYN | Flags::ACK, Some(open))
    }

    /// The bytes that a text of hexadecimal digits stands for.
    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<_> = text.chars().filter_map(|c| c.to_digit(16)).collect();
        digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
    }

    const GOLDEN_V4: &str = "
        08000000 12345600
        0200000000d5 02000000005c 0800
        45000039 00004000 400626bd 0a000001 0a000002
        9c4018eb 00001000 00002000 80180021 00000000
        fd0c7673 6b740100 00000007
        68656c6c6f";

    const GOLDEN_V6: &str = "
        08000000 12345600
        0200000000d5 02000000005c 86dd
        60000000 002d0640 fd000000000000000000000000000001 fd000000000000000000000000000002
        9c4018eb 00001000 00002000 a0120021 00000000
        fd147673 6b74011b 00000007 00000001 00001000
        68656c6c6f";

    #[test]
    fn golden_bytes() {
        for (seg, text) in [(v4(), GOLDEN_V4), (v6(), GOLDEN_V6)] {
            let golden = hex(text);
            let mut out = [0xff; MAX_HEADER_LEN + 5];
            assert_eq!(encapsulate(&seg, b"hello", &mut out), Ok(golden.len()));
            assert_eq!(&out[..golden.len()], golden);
            let header_len = golden.len() - 5;
            assert_eq!(seg.header_len(), header_len);
            assert_eq!(decapsulate(&golden, PayloadAt::Inline), Ok((seg, header_len, 5)));
            assert_eq!(decapsulate(&golden[..header_len], PayloadAt::Elsewhere), Ok((seg, header_len, 5)));
        }
    }

    #[test]
    fn summed() {
        for seg in [v4(), v6()] {
            let mut out = [0; MAX_HEADER_LEN + 5];
            let len = encapsulate_summed(&seg, b"hello", &mut out).unwrap();
            assert_eq!(decapsulate(&out[..len], PayloadAt::Inline), Ok((seg, seg.header_len(), 5)));
            out[len - 1] ^= 1;
            assert_eq!(decapsulate(&out[..len], PayloadAt::Inline), Err(Error::TcpChecksum));
        }
    }

    #[test]
    fn constants() {
        assert_eq!(MAX_HEADER_LEN, 102);
        assert_eq!(MAX_PAYLOAD, 65475);
        assert_eq!(v6().header_len(), MAX_HEADER_LEN);
    }

    #[test]
    fn largest_payload() {
        for seg in [v4(), v6()] {
            let payload = std::vec![0x5a; MAX_PAYLOAD + 1];
            let mut out = std::vec![0; MAX_HEADER_LEN + MAX_PAYLOAD];
            assert_eq!(encapsulate(&seg, &payload, &mut out), Err(Error::PayloadTooLong(MAX_PAYLOAD + 1)));
            let len = encapsulate(&seg, &payload[1..], &mut out).unwrap();
            let read = decapsulate(&out[..len], PayloadAt::Inline);
            assert_eq!(read, Ok((seg, seg.header_len(), MAX_PAYLOAD)));
        }
    }

    #[test]
    fn buffer_of_every_length() {
        for seg in [v4(), v6()] {
            let mut out = [0; MAX_HEADER_LEN + 5];
            let header_len = seg.header_len();
            for len in 0..header_len + 5 {
                assert_eq!(encapsulate(&seg, b"hello", &mut out[..len]), Err(Error::BufferTooSmall));
                let header = encapsulate_header(&seg, 5, &mut out[..len]);
                assert_eq!(
                    header,
                    if len < header_len { Err(Error::BufferTooSmall) } else { Ok(header_len) }
                );
            }
        }
    }

    #[test]
    fn addresses_of_two_versions() {
        let seg = Segment { dst: v6().dst, ..v4() };
        assert_eq!(encapsulate(&seg, b"", &mut [0; 200]), Err(Error::FamilyMismatch));
    }
}
