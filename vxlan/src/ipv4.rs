//! The inner IPv4 header (RFC 791, section 3.1), always five words long.
//!
//! Service type, identification and time to live say nothing to a lane: they are written as constants and not
//! looked at. The packet is never fragmented, so its identification has no meaning (RFC 6864, section 4.1).

use core::net::Ipv4Addr;

use crate::{Error, PROTOCOL_TCP, bytes};

mod field {
    use crate::bytes::Field;

    pub const VERSION_AND_LENGTH: usize = 0;
    pub const SERVICE: usize = 1;
    pub const TOTAL_LENGTH: Field = 2..4;
    pub const IDENTIFICATION: Field = 4..6;
    pub const FLAGS_AND_OFFSET: Field = 6..8;
    pub const TIME_TO_LIVE: usize = 8;
    pub const PROTOCOL: usize = 9;
    pub const CHECKSUM: Field = 10..12;
    pub const SOURCE: Field = 12..16;
    pub const DESTINATION: Field = 16..20;
    pub const END: usize = DESTINATION.end;
}

/// Length of an IPv4 header without options in bytes (RFC 791, section 3.1).
pub const HEADER_LEN: usize = field::END;

/// The largest payload the total length can announce.
pub const MAX_PAYLOAD: usize = u16::MAX as usize - HEADER_LEN;

const WORDS: u8 = (HEADER_LEN / 4) as u8;
const TIME_TO_LIVE: u8 = 64;

/// The reserved flag in the field of flags and fragment offset (RFC 791, section 3.1).
pub const FLAG_RESERVED: u16 = 0x8000;
/// The flag "don't fragment" (RFC 791, section 3.1).
pub const FLAG_DONT_FRAGMENT: u16 = 0x4000;
/// The flag "more fragments" (RFC 791, section 3.1).
pub const FLAG_MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;

/// An IPv4 header in a buffer (RFC 791, section 3.1).
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
    /// [`Error::Ipv4Truncated`].
    pub fn new_checked(buffer: T) -> Result<Packet<T>, Error> {
        let packet = Packet { buffer };
        packet.check_len()?;
        Ok(packet)
    }

    /// Whether the buffer holds the whole header, options aside.
    ///
    /// # Errors
    /// [`Error::Ipv4Truncated`].
    pub fn check_len(&self) -> Result<(), Error> {
        if self.buffer.as_ref().len() < HEADER_LEN { Err(Error::Ipv4Truncated) } else { Ok(()) }
    }

    /// The version.
    pub fn version(&self) -> u8 {
        self.buffer.as_ref()[field::VERSION_AND_LENGTH] >> 4
    }

    /// The header length in words of four bytes.
    pub fn header_words(&self) -> u8 {
        self.buffer.as_ref()[field::VERSION_AND_LENGTH] & 0x0f
    }

    /// The length of header and payload in bytes.
    pub fn total_len(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::TOTAL_LENGTH)
    }

    /// The three flags and the fragment offset, as one number.
    pub fn flags_and_offset(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::FLAGS_AND_OFFSET)
    }

    /// The protocol of the payload.
    pub fn protocol(&self) -> u8 {
        self.buffer.as_ref()[field::PROTOCOL]
    }

    /// The header checksum.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::CHECKSUM)
    }

    /// Whether the header checksum is right, options aside.
    pub fn verify_checksum(&self) -> bool {
        bytes::checksum(bytes::sum(&self.buffer.as_ref()[..HEADER_LEN])) == 0
    }

    /// The source address.
    pub fn src(&self) -> Ipv4Addr {
        Ipv4Addr::from(bytes::array::<4>(self.buffer.as_ref(), field::SOURCE))
    }

    /// The destination address.
    pub fn dst(&self) -> Ipv4Addr {
        Ipv4Addr::from(bytes::array::<4>(self.buffer.as_ref(), field::DESTINATION))
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the version and the header length in words of four bytes, each of which has four bits.
    pub fn set_version_and_words(&mut self, version: u8, words: u8) {
        self.buffer.as_mut()[field::VERSION_AND_LENGTH] = version << 4 | words & 0x0f;
    }

    /// Sets the type of service.
    pub fn set_service(&mut self, service: u8) {
        self.buffer.as_mut()[field::SERVICE] = service;
    }

    /// Sets the length of header and payload in bytes.
    pub fn set_total_len(&mut self, len: u16) {
        bytes::set(self.buffer.as_mut(), field::TOTAL_LENGTH, &len.to_be_bytes());
    }

    /// Sets the identification.
    pub fn set_identification(&mut self, value: u16) {
        bytes::set(self.buffer.as_mut(), field::IDENTIFICATION, &value.to_be_bytes());
    }

    /// Sets the three flags and the fragment offset, as one number.
    pub fn set_flags_and_offset(&mut self, value: u16) {
        bytes::set(self.buffer.as_mut(), field::FLAGS_AND_OFFSET, &value.to_be_bytes());
    }

    /// Sets the time to live.
    pub fn set_time_to_live(&mut self, hops: u8) {
        self.buffer.as_mut()[field::TIME_TO_LIVE] = hops;
    }

    /// Sets the protocol of the payload.
    pub fn set_protocol(&mut self, protocol: u8) {
        self.buffer.as_mut()[field::PROTOCOL] = protocol;
    }

    /// Sets the source address.
    pub fn set_src(&mut self, address: Ipv4Addr) {
        bytes::set(self.buffer.as_mut(), field::SOURCE, &address.octets());
    }

    /// Sets the destination address.
    pub fn set_dst(&mut self, address: Ipv4Addr) {
        bytes::set(self.buffer.as_mut(), field::DESTINATION, &address.octets());
    }

    /// Computes and sets the header checksum, once all other fields are set.
    pub fn fill_checksum(&mut self) {
        let header = &mut self.buffer.as_mut()[..HEADER_LEN];
        bytes::set(header, field::CHECKSUM, &[0, 0]);
        let checksum = bytes::checksum(bytes::sum(header));
        bytes::set(header, field::CHECKSUM, &checksum.to_be_bytes());
    }
}

/// What the IPv4 header of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// The source address.
    pub src: Ipv4Addr,
    /// The destination address.
    pub dst: Ipv4Addr,
    /// Bytes after this header: TCP header and payload.
    pub payload_len: usize,
}

impl Repr {
    /// Reads and checks a header. Whether the payload is there, only the caller can know.
    ///
    /// # Errors
    /// [`Error::Ipv4Truncated`], [`Error::Ipv4Version`], [`Error::Ipv4HeaderLength`], [`Error::Ipv4Options`],
    /// [`Error::Ipv4Checksum`], [`Error::Ipv4TotalLength`], [`Error::Ipv4ReservedFlag`],
    /// [`Error::Fragmented`], [`Error::NotTcp`]; of several, the first in this order.
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Result<Repr, Error> {
        packet.check_len()?;
        match (packet.version(), packet.header_words()) {
            (4, WORDS) => {}
            (4, words) if words < WORDS => return Err(Error::Ipv4HeaderLength(words)),
            (4, _) => return Err(Error::Ipv4Options),
            (version, _) => return Err(Error::Ipv4Version(version)),
        }
        if !packet.verify_checksum() {
            return Err(Error::Ipv4Checksum);
        }
        let total_len = packet.total_len();
        let payload_len =
            usize::from(total_len).checked_sub(HEADER_LEN).ok_or(Error::Ipv4TotalLength(total_len))?;
        if packet.flags_and_offset() & FLAG_RESERVED != 0 {
            return Err(Error::Ipv4ReservedFlag);
        }
        if packet.flags_and_offset() & (FLAG_MORE_FRAGMENTS | OFFSET_MASK) != 0 {
            return Err(Error::Fragmented);
        }
        if packet.protocol() != PROTOCOL_TCP {
            return Err(Error::NotTcp(packet.protocol()));
        }
        Ok(Repr { src: packet.src(), dst: packet.dst(), payload_len })
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
        if self.payload_len > MAX_PAYLOAD {
            return Err(Error::PayloadTooLong(self.payload_len));
        }
        packet.set_version_and_words(4, WORDS);
        packet.set_service(0);
        packet.set_total_len((HEADER_LEN + self.payload_len) as u16);
        packet.set_identification(0);
        packet.set_flags_and_offset(FLAG_DONT_FRAGMENT);
        packet.set_time_to_live(TIME_TO_LIVE);
        packet.set_protocol(protocol);
        packet.set_src(self.src);
        packet.set_dst(self.dst);
        packet.fill_checksum();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 20] = [0x45, 0, 0, 52, 0, 0, 0x40, 0, 64, 6, 0x26, 0xc2, 10, 0, 0, 1, 10, 0, 0, 2];
    const REPR: Repr =
        Repr { src: Ipv4Addr::new(10, 0, 0, 1), dst: Ipv4Addr::new(10, 0, 0, 2), payload_len: 32 };

    fn parse(bytes: &[u8]) -> Result<Repr, Error> {
        Repr::parse(&Packet::new_unchecked(bytes))
    }

    /// What `change` makes of the good header, its checksum put right again.
    fn changed(change: impl FnOnce(&mut Packet<&mut [u8]>)) -> Result<Repr, Error> {
        let mut bytes = BYTES;
        let mut packet = Packet::new_unchecked(&mut bytes[..]);
        change(&mut packet);
        packet.fill_checksum();
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
    fn every_flipped_bit_is_noticed() {
        for bit in 0..BYTES.len() * 8 {
            let mut bytes = BYTES;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&bytes).is_err(), "bit {bit}");
            if bit >= 8 {
                assert_eq!(parse(&bytes), Err(Error::Ipv4Checksum), "bit {bit}");
            }
        }
    }

    #[test]
    fn each_field_has_its_error() {
        assert_eq!(changed(|p| p.set_version_and_words(6, 5)), Err(Error::Ipv4Version(6)));
        assert_eq!(changed(|p| p.set_version_and_words(4, 4)), Err(Error::Ipv4HeaderLength(4)));
        assert_eq!(changed(|p| p.set_version_and_words(4, 6)), Err(Error::Ipv4Options));
        assert_eq!(changed(|p| p.set_total_len(19)), Err(Error::Ipv4TotalLength(19)));
        assert_eq!(changed(|p| p.set_flags_and_offset(FLAG_RESERVED)), Err(Error::Ipv4ReservedFlag));
        assert_eq!(changed(|p| p.set_flags_and_offset(FLAG_MORE_FRAGMENTS)), Err(Error::Fragmented));
        assert_eq!(changed(|p| p.set_flags_and_offset(1)), Err(Error::Fragmented));
        assert_eq!(changed(|p| p.set_protocol(17)), Err(Error::NotTcp(17)));
    }

    #[test]
    fn fields_without_meaning_are_ignored() {
        assert_eq!(changed(|p| p.set_service(0xff)), Ok(REPR));
        assert_eq!(changed(|p| p.set_identification(7)), Ok(REPR));
        assert_eq!(changed(|p| p.set_time_to_live(1)), Ok(REPR));
        assert_eq!(changed(|p| p.set_flags_and_offset(0)), Ok(REPR));
    }

    #[test]
    fn truncated() {
        for len in 0..HEADER_LEN {
            assert_eq!(parse(&BYTES[..len]), Err(Error::Ipv4Truncated));
            assert_eq!(Packet::new_checked(&BYTES[..len]).err(), Some(Error::Ipv4Truncated));
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
