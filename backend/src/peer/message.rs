//! What two backends say to each other on the control connection, as bytes.
//!
//! Every message is a header and a body whose length follows from its type:
//!
//! ```text
//! 0        4        6         8
//! | length | type   | version | body (length bytes)
//! | u32    | u16    | u16     |
//! ```
//!
//! Numbers are big-endian. A length other than the type's own, an unknown type or version, or a field that cannot be
//! right is an error of its own name, and the end of the connection: two backends that disagree about the language
//! must not guess. No I/O here.

#![forbid(unsafe_code)]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str;

use crate::fabric::{Endpoint, Secret};

/// The version of every message.
pub const VERSION: u16 = 2;

/// Length, type, version.
pub const HEADER_LEN: usize = 8;

/// The longest body of any type: what a reader must have room for.
pub const MAX_BODY: usize = Hello::LEN;

/// The longest host name.
pub const MAX_HOST: usize = 64;

/// Where a vport's rx ring is, in the terms of the fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRef {
    /// Steering tag ([`MemoryKey::rkey`](crate::fabric::MemoryKey::rkey)).
    pub stag: u32,
    /// Remote address of the ring's first byte.
    pub base: u64,
    /// The ring's length in bytes.
    pub len: u64,
}

/// The name of a backend's host: 1 to 64 bytes of letters, digits, `-`, `.` and `_`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(String);

impl HostName {
    /// Checks a name.
    pub fn new(name: &str) -> Option<Self> {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        ((1..=MAX_HOST).contains(&name.len()) && name.bytes().all(good)).then(|| Self(name.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

struct Hello;

impl Hello {
    const LEN: usize = 1 + MAX_HOST + 8;
}

/// A message. Flow numbers are the sender's own; `peer_flow` is the number that the receiver gave.
#[derive(Clone, PartialEq, Eq)]
#[allow(missing_docs)] // fields are what their variant's sentence says
pub enum PeerMessage {
    /// First on every connection: who speaks, and since which start of the process.
    Hello { host: HostName, boot_id: u64 },
    /// Are you alive? Answered by the data thread, or not at all.
    Ping { n: u64 },
    /// The answer to `Ping { n }`.
    Pong { n: u64 },
    /// Dial a queue pair for this VNI to this endpoint and present the secret. The number is the offer's own.
    QpOffer { vni: u32, offer: u32, secret: Secret, endpoint: Endpoint },
    /// The offer of that number is being dialled, from this endpoint.
    QpAccept { vni: u32, offer: u32, endpoint: Endpoint },
    /// The offer of that number is not wanted, or its queue pair is lost. Said by either end.
    QpRefuse { vni: u32, offer: u32, reason: u16 },
    /// My vport has opened this tuple; `local` and `remote` as it sees them.
    Offer { flow: u64, vni: u32, local: SocketAddr, remote: SocketAddr, mac: [u8; 6], min_gen: u32 },
    /// The offer stands no longer.
    Revoke { flow: u64, reason: u16 },
    /// My end is prepared for this generation and receives here.
    Prepare { flow: u64, peer_flow: u64, generation: u32, rx: RegionRef },
    /// So is mine.
    Prepared { flow: u64, peer_flow: u64, generation: u32, rx: RegionRef },
    /// Both are: the lane is ready.
    Commit { flow: u64, peer_flow: u64, generation: u32 },
    /// Not this generation, for this reason.
    Refuse { flow: u64, peer_flow: u64, generation: u32, reason: u16 },
    /// The lane must fall back.
    Withdraw { flow: u64, peer_flow: u64, generation: u32, reason: u16 },
    /// A `Withdraw` has been carried out: nothing will be written into that generation's ring any more.
    Withdrawn { flow: u64, peer_flow: u64, generation: u32 },
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum MessageError {
    /// The length is not the one of the type.
    #[error("message type {kind} must have length {expected}, has {length}")]
    WrongLength {
        /// The type.
        kind: u16,
        /// The header's length.
        length: u32,
        /// The type's length.
        expected: u32,
    },
    /// No type has so long a body.
    #[error("message of {length} bytes is longer than any")]
    Oversized {
        /// The header's length.
        length: u32,
    },
    /// A version we do not speak.
    #[error("message version {version} is not {VERSION}")]
    WrongVersion {
        /// The header's version.
        version: u16,
    },
    /// A type we do not know.
    #[error("unknown message type {kind}")]
    UnknownType {
        /// The header's type.
        kind: u16,
    },
    /// A field has no valid meaning.
    #[error("message type {kind} has a bad {field}")]
    BadField {
        /// The type.
        kind: u16,
        /// The field's name.
        field: &'static str,
    },
}

impl MessageError {
    /// A short name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::WrongLength { .. } => "message_length",
            Self::Oversized { .. } => "message_oversized",
            Self::WrongVersion { .. } => "message_version",
            Self::UnknownType { .. } => "message_type",
            Self::BadField { .. } => "message_field",
        }
    }
}

/// (type, name for errors and logs, body length), in the order of the variants.
const TYPES: [(u16, &str, usize); 14] = [
    (1, "hello", Hello::LEN),
    (2, "ping", 8),
    (3, "pong", 8),
    (4, "qp_offer", 8 + 32 + Endpoint::LEN),
    (5, "qp_accept", 8 + Endpoint::LEN),
    (6, "qp_refuse", 10),
    (7, "offer", 8 + 4 + 2 * ADDRESS_LEN + 6 + 4),
    (8, "revoke", 10),
    (9, "prepare", 20 + REGION_LEN),
    (10, "prepared", 20 + REGION_LEN),
    (11, "commit", 20),
    (12, "refuse", 22),
    (13, "withdraw", 22),
    (14, "withdrawn", 20),
];

const ADDRESS_LEN: usize = 1 + 16 + 2;
const REGION_LEN: usize = 4 + 8 + 8;

impl PeerMessage {
    fn kind(&self) -> u16 {
        match self {
            Self::Hello { .. } => 1,
            Self::Ping { .. } => 2,
            Self::Pong { .. } => 3,
            Self::QpOffer { .. } => 4,
            Self::QpAccept { .. } => 5,
            Self::QpRefuse { .. } => 6,
            Self::Offer { .. } => 7,
            Self::Revoke { .. } => 8,
            Self::Prepare { .. } => 9,
            Self::Prepared { .. } => 10,
            Self::Commit { .. } => 11,
            Self::Refuse { .. } => 12,
            Self::Withdraw { .. } => 13,
            Self::Withdrawn { .. } => 14,
        }
    }

    /// The type's name.
    pub fn name(&self) -> &'static str {
        TYPES[usize::from(self.kind()) - 1].1
    }

    /// Appends header and body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, _, len) = TYPES[usize::from(self.kind()) - 1];
        out.extend((len as u32).to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(VERSION.to_be_bytes());
        let start = out.len();
        self.encode_body(&mut Writer(out));
        debug_assert_eq!(out.len() - start, len, "{}", self.name());
    }

    fn encode_body(&self, w: &mut Writer<'_>) {
        match self {
            Self::Hello { host, boot_id } => w.host(host).u64(*boot_id),
            Self::Ping { n } | Self::Pong { n } => w.u64(*n),
            Self::QpOffer { vni, offer, secret, endpoint } => {
                w.u32(*vni).u32(*offer).bytes(secret).bytes(&endpoint.emit())
            }
            Self::QpAccept { vni, offer, endpoint } => w.u32(*vni).u32(*offer).bytes(&endpoint.emit()),
            Self::QpRefuse { vni, offer, reason } => w.u32(*vni).u32(*offer).u16(*reason),
            Self::Offer { flow, vni, local, remote, mac, min_gen } => {
                w.u64(*flow).u32(*vni).address(local).address(remote).bytes(mac).u32(*min_gen)
            }
            Self::Revoke { flow, reason } => w.u64(*flow).u16(*reason),
            Self::Prepare { flow, peer_flow, generation, rx }
            | Self::Prepared { flow, peer_flow, generation, rx } => {
                w.u64(*flow).u64(*peer_flow).u32(*generation).region(rx)
            }
            Self::Commit { flow, peer_flow, generation }
            | Self::Withdrawn { flow, peer_flow, generation } => {
                w.u64(*flow).u64(*peer_flow).u32(*generation)
            }
            Self::Refuse { flow, peer_flow, generation, reason }
            | Self::Withdraw { flow, peer_flow, generation, reason } => {
                w.u64(*flow).u64(*peer_flow).u32(*generation).u16(*reason)
            }
        };
    }

    /// Takes the message at the beginning of `bytes`: it and its length, or `None` if it is not whole yet.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, MessageError> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let kind = u16::from_be_bytes([header[4], header[5]]);
        let version = u16::from_be_bytes([header[6], header[7]]);
        if version != VERSION {
            return Err(MessageError::WrongVersion { version });
        }
        if length as usize > MAX_BODY {
            return Err(MessageError::Oversized { length });
        }
        let known = usize::from(kind).checked_sub(1).and_then(|at| TYPES.get(at));
        let Some(&(_, _, expected)) = known else { return Err(MessageError::UnknownType { kind }) };
        if length as usize != expected {
            return Err(MessageError::WrongLength { kind, length, expected: expected as u32 });
        }
        let Some(body) = rest.get(..expected) else { return Ok(None) };
        let message = decode_body(kind, &mut Reader(body))
            .map_err(|BadField(field)| MessageError::BadField { kind, field })?;
        Ok(Some((message, HEADER_LEN + expected)))
    }
}

fn decode_body(kind: u16, r: &mut Reader<'_>) -> Result<PeerMessage, BadField> {
    use PeerMessage as M;
    Ok(match kind {
        1 => M::Hello { host: r.host()?, boot_id: r.u64() },
        2 => M::Ping { n: r.u64() },
        3 => M::Pong { n: r.u64() },
        4 => M::QpOffer { vni: r.vni()?, offer: r.u32(), secret: r.array(), endpoint: r.endpoint() },
        5 => M::QpAccept { vni: r.vni()?, offer: r.u32(), endpoint: r.endpoint() },
        6 => M::QpRefuse { vni: r.vni()?, offer: r.u32(), reason: r.u16() },
        7 => M::Offer {
            flow: r.u64(),
            vni: r.vni()?,
            local: r.address("local")?,
            remote: r.address("remote")?,
            mac: r.array(),
            min_gen: r.u32(),
        },
        8 => M::Revoke { flow: r.u64(), reason: r.u16() },
        9 => M::Prepare { flow: r.u64(), peer_flow: r.u64(), generation: r.u32(), rx: r.region()? },
        10 => M::Prepared { flow: r.u64(), peer_flow: r.u64(), generation: r.u32(), rx: r.region()? },
        11 => M::Commit { flow: r.u64(), peer_flow: r.u64(), generation: r.u32() },
        12 => M::Refuse { flow: r.u64(), peer_flow: r.u64(), generation: r.u32(), reason: r.u16() },
        13 => M::Withdraw { flow: r.u64(), peer_flow: r.u64(), generation: r.u32(), reason: r.u16() },
        _ => M::Withdrawn { flow: r.u64(), peer_flow: r.u64(), generation: r.u32() },
    })
}

struct BadField(&'static str);

struct Writer<'a>(&'a mut Vec<u8>);

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u16(&mut self, v: u16) -> &mut Self {
        self.bytes(&v.to_be_bytes())
    }

    fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes(&v.to_be_bytes())
    }

    fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes(&v.to_be_bytes())
    }

    fn host(&mut self, host: &HostName) -> &mut Self {
        let mut field = [0; MAX_HOST];
        field[..host.0.len()].copy_from_slice(host.0.as_bytes());
        self.bytes(&[host.0.len() as u8]).bytes(&field)
    }

    fn address(&mut self, address: &SocketAddr) -> &mut Self {
        let mut field = [0; 16];
        let family = match address.ip() {
            IpAddr::V4(ip) => {
                field[..4].copy_from_slice(&ip.octets());
                4
            }
            IpAddr::V6(ip) => {
                field = ip.octets();
                6
            }
        };
        self.bytes(&[family]).bytes(&field).u16(address.port())
    }

    fn region(&mut self, region: &RegionRef) -> &mut Self {
        self.u32(region.stag).u64(region.base).u64(region.len)
    }
}

/// Reads fields from a body of the right length; the length table and the calls are held together by a test.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the body has its type's length");
        self.0 = rest;
        *field
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }

    fn vni(&mut self) -> Result<u32, BadField> {
        let vni = self.u32();
        if (1..1 << 24).contains(&vni) { Ok(vni) } else { Err(BadField("vni")) }
    }

    fn host(&mut self) -> Result<HostName, BadField> {
        let [len] = self.array();
        let field: [u8; MAX_HOST] = self.array();
        let (name, padding) = field.split_at_checked(usize::from(len)).ok_or(BadField("host"))?;
        let name = str::from_utf8(name).ok().and_then(HostName::new).ok_or(BadField("host"))?;
        if padding.iter().all(|&b| b == 0) { Ok(name) } else { Err(BadField("host")) }
    }

    fn address(&mut self, name: &'static str) -> Result<SocketAddr, BadField> {
        let [family] = self.array();
        let field: [u8; 16] = self.array();
        let port = self.u16();
        let ip = match (family, field) {
            (4, [a, b, c, d, rest @ ..]) if rest == [0; 12] => Ipv4Addr::new(a, b, c, d).into(),
            (6, octets) => Ipv6Addr::from(octets).into(),
            _ => return Err(BadField(name)),
        };
        if port == 0 { Err(BadField(name)) } else { Ok(SocketAddr::new(ip, port)) }
    }

    fn endpoint(&mut self) -> Endpoint {
        Endpoint::parse(&self.array())
    }

    fn region(&mut self) -> Result<RegionRef, BadField> {
        let region = RegionRef { stag: self.u32(), base: self.u64(), len: self.u64() };
        if region.base.checked_add(region.len).is_some() { Ok(region) } else { Err(BadField("rx")) }
    }
}

impl fmt::Debug for PeerMessage {
    /// The type's name only: a secret must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_of_each() -> Vec<PeerMessage> {
        use PeerMessage as M;
        let v4 = "198.51.100.1:6379".parse().unwrap();
        let v6 = "[2001:db8:100::1]:6379".parse().unwrap();
        let rx = RegionRef { stag: 0xdead_beef, base: 1 << 40, len: 1 << 20 };
        let (flow, peer_flow, generation, reason) = (1, u64::MAX, 3, 4);
        vec![
            M::Hello { host: HostName::new("h1").unwrap(), boot_id: 77 },
            M::Ping { n: 5 },
            M::Pong { n: 5 },
            M::QpOffer { vni: 100, offer: 1, secret: [9; 32], endpoint: Endpoint::of_address(v4) },
            M::QpAccept { vni: 100, offer: 1, endpoint: Endpoint::of_address(v6) },
            M::QpRefuse { vni: 100, offer: 1, reason },
            M::Offer { flow, vni: 100, local: v4, remote: v6, mac: [2, 0, 0, 0x64, 0, 1], min_gen: 2 },
            M::Revoke { flow, reason },
            M::Prepare { flow, peer_flow, generation, rx },
            M::Prepared { flow, peer_flow, generation, rx },
            M::Commit { flow, peer_flow, generation },
            M::Refuse { flow, peer_flow, generation, reason },
            M::Withdraw { flow, peer_flow, generation, reason },
            M::Withdrawn { flow, peer_flow, generation },
        ]
    }

    fn encoded(message: &PeerMessage) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    #[test]
    fn every_type_survives_the_wire() {
        let all = one_of_each();
        assert_eq!(all.len(), TYPES.len());
        for (message, (kind, _, len)) in all.iter().zip(TYPES) {
            let bytes = encoded(message);
            assert_eq!((message.kind(), bytes.len()), (kind, HEADER_LEN + len));
            assert!(len <= MAX_BODY);
            let (back, used) = PeerMessage::decode(&bytes).unwrap().unwrap();
            assert!(back == *message && used == bytes.len(), "{message:?}");
            for cut in 0..bytes.len() {
                assert!(matches!(PeerMessage::decode(&bytes[..cut]), Ok(None)), "{message:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn bad_headers_have_names() {
        let good = encoded(&PeerMessage::Ping { n: 1 });
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            PeerMessage::decode(&bad[..HEADER_LEN]).unwrap_err()
        };
        assert_eq!(with(0, &[0, 0, 0, 9]), MessageError::WrongLength { kind: 2, length: 9, expected: 8 });
        assert_eq!(with(0, &[1, 0, 0, 0]), MessageError::Oversized { length: 1 << 24 });
        assert_eq!(with(4, &[0, 0]), MessageError::UnknownType { kind: 0 });
        assert_eq!(with(4, &[0, 99]), MessageError::UnknownType { kind: 99 });
        assert_eq!(with(6, &[0, 1]), MessageError::WrongVersion { version: 1 });
    }

    #[test]
    fn bad_fields_have_names() {
        let bad = |index: usize, at: usize, byte: u8| {
            let mut bytes = encoded(&one_of_each()[index]);
            bytes[HEADER_LEN + at] = byte;
            match PeerMessage::decode(&bytes) {
                Err(MessageError::BadField { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(bad(0, 0, 0), "host");
        assert_eq!(bad(0, 0, 65), "host");
        assert_eq!(bad(0, 1, b'/'), "host");
        assert_eq!(bad(0, 40, b'x'), "host");
        assert_eq!(bad(3, 0, 1), "vni");
        assert_eq!(bad(6, 12, 0), "local");
        let mut wraps = encoded(&one_of_each()[8]);
        wraps[HEADER_LEN + 24..HEADER_LEN + 40].fill(0xff);
        assert!(matches!(PeerMessage::decode(&wraps), Err(MessageError::BadField { field: "rx", .. })));
    }

    #[test]
    fn no_bytes_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut buffer = [0; 128];
        for _ in 0..20_000 {
            for byte in &mut buffer {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            // Mostly valid headers, so that bodies are reached.
            let (kind, _, len) = TYPES[usize::from(buffer[8]) % TYPES.len()];
            buffer[..4].copy_from_slice(&(len as u32).to_be_bytes());
            buffer[4..6].copy_from_slice(&kind.to_be_bytes());
            buffer[6..8].copy_from_slice(&VERSION.to_be_bytes());
            let _ = PeerMessage::decode(&buffer);
        }
    }

    #[test]
    fn secrets_stay_out_of_logs() {
        assert_eq!(format!("{:?}", one_of_each()[3]), "qp_offer");
    }
}
