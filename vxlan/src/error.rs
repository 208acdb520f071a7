//! Why a segment was refused: one variant per reason, so that each can be counted by name.

use core::fmt;

/// Why bytes are not a segment, or a segment cannot be put into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Error {
    /// The buffer ends within the VXLAN header (RFC 7348, section 5).
    VxlanTruncated,
    /// The VXLAN header's I flag is clear, so it names no network (RFC 7348, section 5).
    VxlanNoVni,
    /// A reserved bit of the VXLAN header is set (RFC 7348, section 5).
    VxlanReserved,
    /// The number does not fit a VNI's 24 bits (RFC 7348, section 5).
    VniTooLarge(u32),

    /// The buffer ends within the inner Ethernet header.
    EthernetTruncated,
    /// The inner frame has a VLAN tag, which is to be discarded (RFC 7348, section 6.1).
    EthernetTagged,
    /// The inner frame holds neither IPv4 nor IPv6.
    EthernetUnknownType(u16),

    /// The buffer ends within the IPv4 header (RFC 791, section 3.1).
    Ipv4Truncated,
    /// The frame says IPv4, but the packet's version is another one (RFC 791, section 3.1).
    Ipv4Version(u8),
    /// The IPv4 header length is less than five words (RFC 791, section 3.1).
    Ipv4HeaderLength(u8),
    /// The IPv4 header has options (RFC 791, section 3.1); no segment has any.
    Ipv4Options,
    /// The IPv4 header's checksum is wrong (RFC 791, section 3.1).
    Ipv4Checksum,
    /// The IPv4 total length is less than the header's own (RFC 791, section 3.1).
    Ipv4TotalLength(u16),
    /// The reserved IPv4 flag is set (RFC 791, section 3.1).
    Ipv4ReservedFlag,

    /// The buffer ends within the IPv6 header (RFC 8200, section 3).
    Ipv6Truncated,
    /// The frame says IPv6, but the packet's version is another one (RFC 8200, section 3).
    Ipv6Version(u8),
    /// An IPv6 extension header follows (RFC 8200, section 4); no segment has any.
    Ipv6Extension(u8),

    /// The packet is a fragment (RFC 791, section 3.2; RFC 8200, section 4.5).
    Fragmented,
    /// The IP packet carries this protocol, not TCP.
    NotTcp(u8),

    /// The buffer ends within the TCP header, as long as its data offset says (RFC 9293, section 3.1).
    TcpTruncated,
    /// The TCP data offset is less than five words (RFC 9293, section 3.1).
    TcpDataOffset(u8),
    /// A reserved bit of the TCP header is set (RFC 9293, section 3.1).
    TcpReserved,
    /// A control bit is set that no segment uses: URG, ECE or CWR (RFC 9293, section 3.1).
    TcpControlBits(u8),
    /// The urgent pointer is set (RFC 9293, section 3.1); no segment has urgent data.
    TcpUrgent,
    /// A segment cannot both begin and end a stay.
    SynFin,
    /// A segment cannot both begin and abort a stay.
    SynRst,
    /// The TCP checksum is neither 0 nor right (RFC 9293, section 3.1).
    TcpChecksum,
    /// The TCP checksum is not 0, and the payload it covers is not there to verify it.
    TcpChecksumUnverifiable,
    /// A TCP option's length is impossible, or the header ends within it (RFC 9293, section 3.2).
    OptionLength(u8),
    /// The padding after the end of the option list is not zero (RFC 9293, section 3.1).
    OptionPadding,

    /// The segment does not carry the lane's option.
    LaneMissing,
    /// The segment carries the lane's option more than once.
    LaneTwice,
    /// The lane's option has a length it never has.
    LaneLength(u8),
    /// The lane's option has a version this code does not speak.
    LaneVersion(u8),
    /// The lane's option has an escape byte without an opening.
    LaneReserved,
    /// A segment with SYN does not say where the stay begins.
    LaneOpenMissing,
    /// A segment without SYN says where a stay begins.
    LaneOpenWithoutSyn,

    /// The length in the IP header does not cover the TCP header.
    LengthTooShort,
    /// The IP header announces more payload than the buffer holds.
    PayloadTruncated,
    /// The buffer goes on after the payload that the IP header announces.
    PayloadTrailing,
    /// The buffer goes on after the header, although the payload went another way.
    PayloadUnexpected,
    /// The payload is longer than [`MAX_PAYLOAD`](crate::MAX_PAYLOAD), or than its IP header can say.
    PayloadTooLong(usize),
    /// The two addresses are not of the same IP version.
    FamilyMismatch,
    /// The buffer cannot hold the segment.
    BufferTooSmall,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VniTooLarge(vni) => write!(f, "VNI {vni} does not fit 24 bits"),
            Self::EthernetUnknownType(kind) => write!(f, "unknown ethertype {kind:#06x}"),
            Self::Ipv4Version(version) => write!(f, "IPv4 packet of version {version}"),
            Self::Ipv4HeaderLength(words) => write!(f, "IPv4 header of {words} words"),
            Self::Ipv4TotalLength(len) => write!(f, "IPv4 total length {len} is less than the header"),
            Self::Ipv6Version(version) => write!(f, "IPv6 packet of version {version}"),
            Self::Ipv6Extension(kind) => write!(f, "IPv6 extension header {kind}"),
            Self::NotTcp(protocol) => write!(f, "IP protocol {protocol} is not TCP"),
            Self::TcpDataOffset(words) => write!(f, "TCP data offset of {words} words"),
            Self::TcpControlBits(bits) => write!(f, "unused TCP control bits in {bits:#04x}"),
            Self::OptionLength(len) => write!(f, "TCP option of impossible length {len}"),
            Self::LaneLength(len) => write!(f, "lane option of impossible length {len}"),
            Self::LaneVersion(version) => write!(f, "lane option of unknown version {version}"),
            Self::PayloadTooLong(len) => write!(f, "payload of {len} bytes is too long"),
            plain => f.write_str(plain.text()),
        }
    }
}

impl Error {
    /// The text of the variants that carry no number.
    fn text(&self) -> &'static str {
        match self {
            Self::VxlanTruncated => "VXLAN header truncated",
            Self::VxlanNoVni => "VXLAN header without a VNI",
            Self::VxlanReserved => "reserved bits set in the VXLAN header",
            Self::EthernetTruncated => "Ethernet header truncated",
            Self::EthernetTagged => "inner frame has a VLAN tag",
            Self::Ipv4Truncated => "IPv4 header truncated",
            Self::Ipv4Options => "IPv4 header has options",
            Self::Ipv4Checksum => "wrong IPv4 header checksum",
            Self::Ipv4ReservedFlag => "reserved IPv4 flag set",
            Self::Ipv6Truncated => "IPv6 header truncated",
            Self::Fragmented => "IP fragment",
            Self::TcpTruncated => "TCP header truncated",
            Self::TcpReserved => "reserved bits set in the TCP header",
            Self::TcpUrgent => "TCP urgent pointer set",
            Self::SynFin => "SYN and FIN in one segment",
            Self::SynRst => "SYN and RST in one segment",
            Self::TcpChecksum => "wrong TCP checksum",
            Self::TcpChecksumUnverifiable => "TCP checksum over a payload that is elsewhere",
            Self::OptionPadding => "TCP header padding is not zero",
            Self::LaneMissing => "no lane option",
            Self::LaneTwice => "more than one lane option",
            Self::LaneReserved => "escape byte in a lane option without an opening",
            Self::LaneOpenMissing => "SYN without an opening in the lane option",
            Self::LaneOpenWithoutSyn => "opening in the lane option without SYN",
            Self::LengthTooShort => "IP length does not cover the TCP header",
            Self::PayloadTruncated => "payload truncated",
            Self::PayloadTrailing => "bytes after the payload",
            Self::PayloadUnexpected => "bytes after a header sent alone",
            Self::FamilyMismatch => "addresses of two IP versions",
            Self::BufferTooSmall => "buffer too small for the segment",
            _ => "segment refused",
        }
    }
}

impl core::error::Error for Error {}
