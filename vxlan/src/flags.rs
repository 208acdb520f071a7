//! The control bits of the inner TCP header (RFC 9293, section 3.1), and what they mean on a lane.

use crate::Error;

/// The control bits a segment may have (RFC 9293, section 3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u8);

impl Flags {
    /// The stream ends after this segment's payload.
    pub const FIN: Flags = Flags(0x01);
    /// A stay on the lane begins.
    pub const SYN: Flags = Flags(0x02);
    /// The connection is aborted.
    pub const RST: Flags = Flags(0x04);
    /// The receiver should be told now.
    pub const PSH: Flags = Flags(0x08);
    /// The acknowledgement is valid.
    pub const ACK: Flags = Flags(0x10);

    const ALL: u8 = 0x1f;

    /// No control bit.
    pub const fn empty() -> Flags {
        Flags(0)
    }

    /// The control bits with these values in the header.
    ///
    /// # Errors
    /// [`Error::TcpControlBits`] for bits without a name here, [`Error::SynFin`] and [`Error::SynRst`] for
    /// combinations without a meaning.
    pub const fn from_bits(bits: u8) -> Result<Flags, Error> {
        if bits & !Self::ALL != 0 {
            return Err(Error::TcpControlBits(bits));
        }
        let flags = Flags(bits);
        if flags.contains(Self::SYN.with(Self::FIN)) {
            return Err(Error::SynFin);
        }
        if flags.contains(Self::SYN.with(Self::RST)) {
            return Err(Error::SynRst);
        }
        Ok(flags)
    }

    /// Their values in the header.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether all these are set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and those.
    pub const fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

impl core::ops::BitOr for Flags {
    type Output = Flags;

    fn bitor(self, other: Flags) -> Flags {
        self.with(other)
    }
}

impl core::ops::BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Flags) {
        *self = self.with(other);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_pattern_has_one_verdict() {
        for bits in 0..=u8::MAX {
            let expected = match bits {
                _ if bits & 0xe0 != 0 => Err(Error::TcpControlBits(bits)),
                _ if bits & 0x03 == 0x03 => Err(Error::SynFin),
                _ if bits & 0x06 == 0x06 => Err(Error::SynRst),
                _ => Ok(Flags(bits)),
            };
            assert_eq!(Flags::from_bits(bits), expected, "{bits:#04x}");
        }
    }

    #[test]
    fn sets() {
        let mut flags = Flags::PSH | Flags::ACK;
        assert!(flags.contains(Flags::ACK) && !flags.contains(Flags::ACK | Flags::FIN));
        flags |= Flags::FIN;
        assert_eq!(flags.bits(), 0x19);
        assert_eq!(Flags::empty(), Flags::default());
    }
}
