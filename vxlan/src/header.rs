//! The VXLAN header (RFC 7348, section 5): which virtual network a frame belongs to.
//!
//! The RFC asks a receiver to ignore reserved bits. We refuse them: the sender is always another backend of ours,
//! which leaves them zero, and a bit that some extension defines (a group policy, another inner protocol) would
//! change what the rest means.

use core::fmt;

use crate::{Error, bytes};

mod field {
    use crate::bytes::Field;

    pub const FLAGS: usize = 0;
    pub const RESERVED_1: Field = 1..4;
    pub const VNI: Field = 4..7;
    pub const RESERVED_2: usize = 7;
    pub const END: usize = RESERVED_2 + 1;
}

/// Length of the VXLAN header in bytes (RFC 7348, section 5).
pub const HEADER_LEN: usize = field::END;

/// The I flag: the VNI is valid (RFC 7348, section 5).
pub const FLAG_VNI: u8 = 0x08;

/// A VXLAN network identifier, 24 bits (RFC 7348, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The largest VNI.
    pub const MAX: Vni = Vni(0xff_ffff);

    /// The VNI with this number.
    ///
    /// # Errors
    /// [`Error::VniTooLarge`] if the number does not fit 24 bits.
    pub const fn new(number: u32) -> Result<Vni, Error> {
        if number > Self::MAX.0 { Err(Error::VniTooLarge(number)) } else { Ok(Vni(number)) }
    }

    /// Its number.
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = Error;

    fn try_from(number: u32) -> Result<Vni, Error> {
        Vni::new(number)
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> u32 {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A VXLAN header in a buffer (RFC 7348, section 5).
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
    /// [`Error::VxlanTruncated`].
    pub fn new_checked(buffer: T) -> Result<Packet<T>, Error> {
        let packet = Packet { buffer };
        packet.check_len()?;
        Ok(packet)
    }

    /// Whether the buffer holds the whole header.
    ///
    /// # Errors
    /// [`Error::VxlanTruncated`].
    pub fn check_len(&self) -> Result<(), Error> {
        if self.buffer.as_ref().len() < HEADER_LEN { Err(Error::VxlanTruncated) } else { Ok(()) }
    }

    /// The flags, all eight.
    pub fn flags(&self) -> u8 {
        self.buffer.as_ref()[field::FLAGS]
    }

    /// The network's number.
    pub fn vni(&self) -> Vni {
        let [a, b, c] = bytes::array(self.buffer.as_ref(), field::VNI);
        Vni(u32::from_be_bytes([0, a, b, c]))
    }

    /// The reserved bytes: three before the VNI, one after it.
    pub fn reserved(&self) -> [u8; 4] {
        let buffer = self.buffer.as_ref();
        let [a, b, c] = bytes::array(buffer, field::RESERVED_1);
        [a, b, c, buffer[field::RESERVED_2]]
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the flags, all eight.
    pub fn set_flags(&mut self, flags: u8) {
        self.buffer.as_mut()[field::FLAGS] = flags;
    }

    /// Sets the network's number.
    pub fn set_vni(&mut self, vni: Vni) {
        bytes::set(self.buffer.as_mut(), field::VNI, &vni.0.to_be_bytes()[1..]);
    }

    /// Sets the reserved bytes: three before the VNI, one after it.
    pub fn set_reserved(&mut self, reserved: [u8; 4]) {
        let buffer = self.buffer.as_mut();
        bytes::set(buffer, field::RESERVED_1, &reserved[..3]);
        buffer[field::RESERVED_2] = reserved[3];
    }
}

/// What a VXLAN header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// The network.
    pub vni: Vni,
}

impl Repr {
    /// Reads and checks a header.
    ///
    /// # Errors
    /// [`Error::VxlanTruncated`], [`Error::VxlanNoVni`], [`Error::VxlanReserved`].
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Result<Repr, Error> {
        packet.check_len()?;
        if packet.flags() & FLAG_VNI == 0 {
            return Err(Error::VxlanNoVni);
        }
        if packet.flags() != FLAG_VNI || packet.reserved() != [0; 4] {
            return Err(Error::VxlanReserved);
        }
        Ok(Repr { vni: packet.vni() })
    }

    /// Writes the header: every byte of it, whatever the buffer held.
    pub fn emit<T: AsRef<[u8]> + AsMut<[u8]>>(&self, packet: &mut Packet<T>) {
        packet.set_flags(FLAG_VNI);
        packet.set_reserved([0; 4]);
        packet.set_vni(self.vni);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: [u8; 8] = [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0];
    const REPR: Repr = Repr { vni: Vni(0x123456) };

    fn parse(bytes: &[u8]) -> Result<Repr, Error> {
        Repr::parse(&Packet::new_unchecked(bytes))
    }

    #[test]
    fn parse_and_emit() {
        assert_eq!(parse(&BYTES), Ok(REPR));
        let mut out = [0xff; 8];
        REPR.emit(&mut Packet::new_unchecked(&mut out));
        assert_eq!(out, BYTES);
    }

    #[test]
    fn every_bit_but_the_vni_is_checked() {
        for bit in (0..32).chain(56..64) {
            let mut bytes = BYTES;
            bytes[bit / 8] ^= 0x80 >> (bit % 8);
            let expected = if bit == 4 { Error::VxlanNoVni } else { Error::VxlanReserved };
            assert_eq!(parse(&bytes), Err(expected), "bit {bit}");
        }
    }

    #[test]
    fn truncated() {
        for len in 0..HEADER_LEN {
            assert_eq!(parse(&BYTES[..len]), Err(Error::VxlanTruncated));
            assert_eq!(Packet::new_checked(&BYTES[..len]).err(), Some(Error::VxlanTruncated));
        }
    }

    #[test]
    fn vni_has_24_bits() {
        assert_eq!(Vni::new(0xff_ffff), Ok(Vni::MAX));
        assert_eq!(Vni::try_from(0x100_0000), Err(Error::VniTooLarge(0x100_0000)));
        assert_eq!(u32::from(Vni::MAX), Vni::MAX.number());
        assert_eq!(std::format!("{}", Vni::MAX), "16777215");
    }
}
