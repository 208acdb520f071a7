//! What two ends of a queue pair tell each other before it exists, through a connection they already trust.
//!
//! The daemon carries it and does not look inside: only the fabric that wrote it, and one of the same kind at the other
//! host, know what the bytes mean.

#![forbid(unsafe_code)]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Which fabric this is. Two of different kinds cannot be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Both ends in one process.
    Memory,
    /// User space over TCP.
    Soft,
    /// An RDMA device.
    Verbs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Soft, Self::Verbs];

    /// As the operator writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Soft => "soft",
            Self::Verbs => "verbs",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Memory => 0,
            Self::Soft => 1,
            Self::Verbs => 2,
        }
    }
}

/// One end's half of the agreement. Of fixed size, so that it has its place in a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    kind: u8,
    bytes: [u8; Self::BYTES],
}

impl Endpoint {
    /// What a kind of fabric has room for.
    pub const BYTES: usize = 32;

    /// As it travels.
    pub const LEN: usize = 1 + Self::BYTES;

    /// An endpoint of this kind; what is left of the room is zero.
    ///
    /// # Panics
    ///
    /// If there are more than [`BYTES`](Self::BYTES): each fabric's form has a fixed length.
    pub fn new(kind: Kind, form: &[u8]) -> Self {
        let mut bytes = [0; Self::BYTES];
        bytes[..form.len()].copy_from_slice(form);
        Self { kind: kind.code(), bytes }
    }

    /// The kind of fabric that wrote it, if we know it.
    pub fn kind(&self) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.code() == self.kind)
    }

    /// The kind's name.
    pub fn kind_name(&self) -> &'static str {
        self.kind().map_or("unknown", Kind::name)
    }

    /// What only that kind understands.
    pub fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.bytes
    }

    /// For the wire.
    pub fn emit(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0] = self.kind;
        out[1..].copy_from_slice(&self.bytes);
        out
    }

    /// From the wire. Any bytes are an endpoint: whether they mean something is for the fabric to find out.
    pub fn parse(wire: &[u8; Self::LEN]) -> Self {
        let [kind, bytes @ ..] = *wire;
        Self { kind, bytes }
    }

    /// The soft fabric's form: the socket address to dial.
    pub fn of_address(address: SocketAddr) -> Self {
        let mut form = [0; 19];
        match address.ip() {
            IpAddr::V4(ip) => {
                form[0] = 4;
                form[1..5].copy_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                form[0] = 6;
                form[1..17].copy_from_slice(&ip.octets());
            }
        }
        form[17..].copy_from_slice(&address.port().to_be_bytes());
        Self::new(Kind::Soft, &form)
    }

    /// The socket address of the soft fabric's form.
    pub fn address(&self) -> Option<SocketAddr> {
        if self.kind() != Some(Kind::Soft) {
            return None;
        }
        let (form, rest) = self.bytes.split_first_chunk::<19>()?;
        let port = u16::from_be_bytes([form[17], form[18]]);
        let mut octets = [0; 16];
        octets.copy_from_slice(&form[1..17]);
        let ip: IpAddr = match (form[0], octets) {
            (4, [a, b, c, d, padding @ ..]) if padding == [0; 12] => Ipv4Addr::new(a, b, c, d).into(),
            (6, octets) => Ipv6Addr::from(octets).into(),
            _ => return None,
        };
        (port != 0 && rest.iter().all(|&byte| byte == 0)).then_some(SocketAddr::new(ip, port))
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("kind", &self.kind_name()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_wire_and_only_they() {
        for text in ["192.0.2.1:4790", "[2001:db8::1]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            let endpoint = Endpoint::of_address(address);
            let back = Endpoint::parse(&endpoint.emit());
            assert_eq!((back, back.address(), back.kind()), (endpoint, Some(address), Some(Kind::Soft)));
        }
        let with = |at: usize, byte: u8| {
            let mut wire = Endpoint::of_address("192.0.2.1:4790".parse().unwrap()).emit();
            wire[at] = byte;
            Endpoint::parse(&wire)
        };
        assert_eq!(with(0, 2).address(), None, "another kind");
        assert_eq!((with(0, 9).kind(), with(0, 9).kind_name()), (None, "unknown"));
        assert_eq!(with(1, 5).address(), None, "no family");
        assert_eq!(with(10, 1).address(), None, "padding");
        assert_eq!(with(30, 1).address(), None, "rest");
        let no_port = Endpoint::of_address("192.0.2.1:0".parse().unwrap());
        assert_eq!(no_port.address(), None);
    }
}
