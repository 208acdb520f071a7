//! The inner IPv6 header (RFC 8200, section 3), without extension headers.
//!
//! Traffic class, flow label and hop limit say nothing to a lane: they are written as constants and not looked
//! at.

use core::net::Ipv6Addr;

use crate::{Error, PROTOCOL_TCP, bytes};

mod field {
    use crate::bytes::Field;

    pub const VERSION_CLASS_FLOW: Field = 0..4;
    pub const PAYLOAD_LENGTH: Field = 4..6;
    pub const NEXT_HEADER: usize = 6;
    pub const HOP_LIMIT: usize = 7;
    pub const SOURCE: Field = 8..24;
    pub const DESTINATION: Field = 24..40;
    pub const END: usize = DESTINATION.end;
}

/// Length of the IPv6 header in bytes (RFC 8200, section 3).
pub const HEADER_LEN: usize = field::END;

/// The largest payload the payload length can announce.
pub const MAX_PAYLOAD: usize = u16::MAX as usize;

const HOP_LIMIT: u8 = 64;
const NEXT_FRAGMENT: u8 = 44;

/// An IPv6 header in a buffer (RFC 8200, section 3).
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Takes a buffer that is known to be long enough.
    pub const fn new_unchecked(buffer: T) -> Packet<T> {
        Packet { buffer }
    }

    /// Takes a buffer and checks its length.
    ///
    /// # Errors
    /// [`Error::Ipv6Truncated`].
    pub fn new_checked(buffer: T) -> Result<Packet<T>, Error> {
        let packet = Packet { buffer };
        packet.check_len()?;
        Ok(packet)
    }

    /// Whether the buffer holds the whole header.
    ///
    /// # Errors
    /// [`Error::Ipv6Truncated`].
    pub fn check_len(&self) -> Result<(), Error> {
        if self.buffer.as_ref().len() < HEADER_LEN { Err(Error::Ipv6Truncated) } else { Ok(()) }
    }

    /// The version.
    pub fn version(&self) -> u8 {
        self.buffer.as_ref()[field::VERSION_CLASS_FLOW.start] >> 4
    }

    /// The length of what follows this header in bytes.
    pub fn payload_len(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::PAYLOAD_LENGTH)
    }

    /// What follows: an extension header or the payload's protocol.
    pub fn next_header(&self) -> u8 {
        self.buffer.as_ref()[field::NEXT_HEADER]
    }

    /// The source address.
    pub fn src(&self) -> Ipv6Addr {
        Ipv6Addr::from(bytes::array::<16>(self.buffer.as_ref(), field::SOURCE))
    }

    /// The destination address.
    pub fn dst(&self) -> Ipv6Addr {
        Ipv6Addr::from(bytes::array::<16>(self.buffer.as_ref(), field::DESTINATION))
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the version (4 bits), the traffic class (8) and the flow label (20).
    pub fn set_version_class_flow(&mut self, version: u8, class: u8, flow: u32) {
        let word = u32::from(version) << 28 | u32::from(class) << 20 | flow & 0xf_ffff;
        bytes::set(self.buffer.as_mut(), field::VERSION_CLASS_FLOW, &word.to_be_bytes());
    }

    /// Sets the length of what follows this header in bytes.
    pub fn set_payload_len(&mut self, len: u16) {
        bytes::set(self.buffer.as_mut(), field::PAYLOAD_LENGTH, &len.to_be_bytes());
    }

    /// Sets what follows.
    pub fn set_next_header(&mut self, kind: u8) {
        self.buffer.as_mut()[field::NEXT_HEADER] = kind;
    }

    /// Sets the hop limit.
    pub fn set_hop_limit(&mut self, hops: u8) {
        self.buffer.as_mut()[field::HOP_LIMIT] = hops;
    }

    /// Sets the source address.
    pub fn set_src(&mut self, address: Ipv6Addr) {
        bytes::set(self.buffer.as_mut(), field::SOURCE, &address.octets());
    }

    /// Sets the destination address.
    pub fn set_dst(&mut self, address: Ipv6Addr) {
        bytes::set(self.buffer.as_mut(), field::DESTINATION, &address.octets());
    }
}

/// What the IPv6 header of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// The source address.
    pub src: Ipv6Addr,
    /// The destination address.
    pub dst: Ipv6Addr,
    /// Bytes after this header: TCP header and payload.
    pub payload_len: usize,
}

impl Repr {
    /// Reads and checks a header. Whether the payload is there, only the caller can know.
    ///
    /// # Errors
    /// [`Error::Ipv6Truncated`], [`Error::Ipv6Version`], [`Error::Fragmented`], [`Error::Ipv6Extension`],
    /// [`Error::NotTcp`].
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Result<Repr, Error> {
        packet.check_len()?;
        if packet.version() != 6 {
            return Err(Error::Ipv6Version(packet.version()));
        }
        match packet.next_header() {
            PROTOCOL_TCP => {}
            NEXT_FRAGMENT => return Err(Error::Fragmented),
            kind if is_extension(kind) => return Err(Error::Ipv6Extension(kind)),
            kind => return Err(Error::NotTcp(kind)),
        }
        Ok(Repr { src: packet.src(), dst: packet.dst(), payload_len: packet.payload_len().into() })
    }

    /// Writes the header: every byte of it, whatever the buffer held.
    ///
    /// # Errors
    /// [`Error::PayloadTooLong`] if the payload is longer than [`MAX_PAYLOAD`].
    pub fn emit<T: AsRef<[u8]> + AsMut<[u8]>>(&self, packet: &mut Packet<T>) -> Result<(), Error> {
        self.emit_for(packet, PROTOCOL_TCP)
    }

    /// The same for a payload of another protocol.
    pub(crate) fn emit_for<T: AsRef<[u8]> + AsMut<[u8]>>(
        &self,
        packet: &mut Packet<T>,
        protocol: u8,
    ) -> Result<(), Error> {
        let payload_len =
            u16::try_from(self.payload_len).map_err(|_| Error::PayloadTooLong(self.payload_len))?;
        packet.set_version_class_flow(6, 0, 0);
        packet.set_payload_len(payload_len);
        packet.set_next_header(protocol);
        packet.set_hop_limit(HOP_LIMIT);
        packet.set_src(self.src);
        packet.set_dst(self.dst);
        Ok(())
    }
}

/// Whether this next header is an extension other than a fragment's: hop-by-hop, routing, ESP, authentication,
/// destination options (RFC 8200, section 4), mobility, HIP, Shim6, and the two for experiments (RFC 7045).
fn is_extension(kind: u8) -> bool {
    matches!(kind, 0 | 43 | 50 | 51 | 60 | 135 | 139 | 140 | 253 | 254)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 40] = [
        0x60, 0, 0, 0, 0, 32, 6, 64, //
        0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, //
        0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
    ];
    const REPR: Repr = Repr {
        src: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
        dst: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2),
        payload_len: 32,
    };

    fn parse(bytes: &[u8]) -> Result<Repr, Error> {
        Repr::parse(&Packet::new_unchecked(bytes))
    }

    fn changed(change: impl FnOnce(&mut Packet<&mut [u8]>)) -> Result<Repr, Error> {
        let mut bytes = BYTES;
        change(&mut Packet::new_unchecked(&mut bytes[..]));
        parse(&bytes)
    }

    #[test]
    fn parse_and_emit() {
        assert_eq!(parse(&BYTES), Ok(REPR));
        let mut out = [0xff; HEADER_LEN];
        REPR.emit(&mut Packet::new_unchecked(&mut out)).unwrap();
        assert_eq!(out, BYTES);
    }

    #[test]
    fn each_field_has_its_error() {
        assert_eq!(changed(|p| p.set_version_class_flow(4, 0, 0)), Err(Error::Ipv6Version(4)));
        assert_eq!(changed(|p| p.set_next_header(44)), Err(Error::Fragmented));
        assert_eq!(changed(|p| p.set_next_header(60)), Err(Error::Ipv6Extension(60)));
        assert_eq!(changed(|p| p.set_next_header(17)), Err(Error::NotTcp(17)));
    }

    #[test]
    fn fields_without_meaning_are_ignored() {
        assert_eq!(changed(|p| p.set_version_class_flow(6, 0xff, 0xf_ffff)), Ok(REPR));
        assert_eq!(changed(|p| p.set_hop_limit(1)), Ok(REPR));
    }

    #[test]
    fn truncated() {
        for len in 0..HEADER_LEN {
            assert_eq!(parse(&BYTES[..len]), Err(Error::Ipv6Truncated));
            assert_eq!(Packet::new_checked(&BYTES[..len]).err(), Some(Error::Ipv6Truncated));
        }
    }

    #[test]
    fn largest_payload() {
        let mut out = [0; HEADER_LEN];
        let mut emit = |payload_len| Repr { payload_len, ..REPR }.emit(&mut Packet::new_unchecked(&mut out));
        assert_eq!(emit(MAX_PAYLOAD + 1), Err(Error::PayloadTooLong(MAX_PAYLOAD + 1)));
        assert_eq!(emit(MAX_PAYLOAD), Ok(()));
        assert_eq!(parse(&out), Ok(Repr { payload_len: MAX_PAYLOAD, ..REPR }));
    }
}
