//! The inner Ethernet II header (IEEE 802.3; RFC 7348, section 5): whose frame it is.
//!
//! There is no VLAN tag (RFC 7348, section 6.1), no padding to a minimum size and no frame check sequence: no
//! wire needs them here.

use crate::{Error, bytes};

mod field {
    use crate::bytes::Field;

    pub const DESTINATION: Field = 0..6;
    pub const SOURCE: Field = 6..12;
    pub const ETHERTYPE: Field = 12..14;
    pub const END: usize = ETHERTYPE.end;
}

/// Length of an untagged Ethernet II header in bytes.
pub const HEADER_LEN: usize = field::END;

/// What an Ethernet frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EtherType {
    /// IPv4, 0x0800.
    Ipv4,
    /// IPv6, 0x86dd.
    Ipv6,
    /// A VLAN tag, 0x8100 (IEEE 802.1Q) or 0x88a8 (its service tag).
    Vlan(u16),
    /// Anything else.
    Unknown(u16),
}

impl From<u16> for EtherType {
    fn from(value: u16) -> EtherType {
        match value {
            0x0800 => EtherType::Ipv4,
            0x86dd => EtherType::Ipv6,
            0x8100 | 0x88a8 => EtherType::Vlan(value),
            _ => EtherType::Unknown(value),
        }
    }
}

impl From<EtherType> for u16 {
    fn from(kind: EtherType) -> u16 {
        match kind {
            EtherType::Ipv4 => 0x0800,
            EtherType::Ipv6 => 0x86dd,
            EtherType::Vlan(value) | EtherType::Unknown(value) => value,
        }
    }
}

/// An Ethernet II header in a buffer.
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
    /// [`Error::EthernetTruncated`].
    pub fn new_checked(buffer: T) -> Result<Packet<T>, Error> {
        let packet = Packet { buffer };
        packet.check_len()?;
        Ok(packet)
    }

    /// Whether the buffer holds the whole header.
    ///
    /// # Errors
    /// [`Error::EthernetTruncated`].
    pub fn check_len(&self) -> Result<(), Error> {
        if self.buffer.as_ref().len() < HEADER_LEN { Err(Error::EthernetTruncated) } else { Ok(()) }
    }

    /// The destination address.
    pub fn dst(&self) -> [u8; 6] {
        bytes::array(self.buffer.as_ref(), field::DESTINATION)
    }

    /// The source address.
    pub fn src(&self) -> [u8; 6] {
        bytes::array(self.buffer.as_ref(), field::SOURCE)
    }

    /// What follows.
    pub fn ethertype(&self) -> EtherType {
        bytes::u16(self.buffer.as_ref(), field::ETHERTYPE).into()
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the destination address.
    pub fn set_dst(&mut self, address: [u8; 6]) {
        bytes::set(self.buffer.as_mut(), field::DESTINATION, &address);
    }

    /// Sets the source address.
    pub fn set_src(&mut self, address: [u8; 6]) {
        bytes::set(self.buffer.as_mut(), field::SOURCE, &address);
    }

    /// Sets what follows.
    pub fn set_ethertype(&mut self, kind: EtherType) {
        bytes::set(self.buffer.as_mut(), field::ETHERTYPE, &u16::from(kind).to_be_bytes());
    }
}

/// The IP version a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What an Ethernet header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// The destination address.
    pub dst: [u8; 6],
    /// The source address.
    pub src: [u8; 6],
    /// What follows.
    pub version: IpVersion,
}

impl Repr {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`Error::EthernetTruncated`], [`Error::EthernetTagged`], [`Error::EthernetUnknownType`].
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Result<Repr, Error> {
        packet.check_len()?;
        let version = match packet.ethertype() {
            EtherType::Ipv4 => IpVersion::V4,
            EtherType::Ipv6 => IpVersion::V6,
            EtherType::Vlan(_) => return Err(Error::EthernetTagged),
            EtherType::Unknown(value) => return Err(Error::EthernetUnknownType(value)),
        };
        Ok(Repr { dst: packet.dst(), src: packet.src(), version })
    }

    /// Writes the header: every byte of it, whatever the buffer held.
    pub fn emit<T: AsRef<[u8]> + AsMut<[u8]>>(&self, packet: &mut Packet<T>) {
        packet.set_dst(self.dst);
        packet.set_src(self.src);
        packet.set_ethertype(match self.version {
            IpVersion::V4 => EtherType::Ipv4,
            IpVersion::V6 => EtherType::Ipv6,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 14] = [2, 0, 0, 0, 0, 0xd5, 2, 0, 0, 0, 0, 0x5c, 0x08, 0x00];
    const REPR: Repr =
        Repr { dst: [2, 0, 0, 0, 0, 0xd5], src: [2, 0, 0, 0, 0, 0x5c], version: IpVersion::V4 };

    fn parse(bytes: &[u8]) -> Result<Repr, Error> {
        Repr::parse(&Packet::new_unchecked(bytes))
    }

    #[test]
    fn parse_and_emit() {
        assert_eq!(parse(&BYTES), Ok(REPR));
        let mut out = [0xff; HEADER_LEN];
        REPR.emit(&mut Packet::new_unchecked(&mut out));
        assert_eq!(out, BYTES);
    }

    #[test]
    fn only_ip_is_known() {
        for value in 0..=u16::MAX {
            let mut bytes = BYTES;
            bytes[12..].copy_from_slice(&value.to_be_bytes());
            let expected = match value {
                0x0800 => Ok(REPR),
                0x86dd => Ok(Repr { version: IpVersion::V6, ..REPR }),
                0x8100 | 0x88a8 => Err(Error::EthernetTagged),
                _ => Err(Error::EthernetUnknownType(value)),
            };
            assert_eq!(parse(&bytes), expected);
            assert_eq!(u16::from(EtherType::from(value)), value);
        }
    }

    #[test]
    fn truncated() {
        for len in 0..HEADER_LEN {
            assert_eq!(parse(&BYTES[..len]), Err(Error::EthernetTruncated));
            assert_eq!(Packet::new_checked(&BYTES[..len]).err(), Some(Error::EthernetTruncated));
        }
    }
}
