//! The outer UDP header (RFC 768), as VXLAN uses it (RFC 7348, section 5).

use core::net::IpAddr;

use crate::{Error, PROTOCOL_UDP, bytes};

mod field {
    use crate::bytes::Field;

    pub const SOURCE: Field = 0..2;
    pub const DESTINATION: Field = 2..4;
    pub const LENGTH: Field = 4..6;
    pub const CHECKSUM: Field = 6..8;
    pub const END: usize = CHECKSUM.end;
}

/// Length of a UDP header in bytes (RFC 768).
pub const HEADER_LEN: usize = field::END;

/// The largest payload the length can announce.
pub const MAX_PAYLOAD: usize = u16::MAX as usize - HEADER_LEN;

/// The port of VXLAN (RFC 7348, section 5).
pub const PORT_VXLAN: u16 = 4789;

/// A UDP header, and what follows it, in a buffer (RFC 768).
#[derive(Clone, Copy, Debug)]
pub struct Packet<T: AsRef<[u8]>> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Takes a buffer that is known to be long enough.
    pub const fn new_unchecked(buffer: T) -> Packet<T> {
        Packet { buffer }
    }

    /// The source port.
    pub fn src_port(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::SOURCE)
    }

    /// The destination port.
    pub fn dst_port(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::DESTINATION)
    }

    /// The length of header and payload in bytes.
    pub fn len(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::LENGTH)
    }

    /// Whether there is no payload.
    pub fn is_empty(&self) -> bool {
        usize::from(self.len()) <= HEADER_LEN
    }

    /// The checksum; 0 is none.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::CHECKSUM)
    }

    /// Whether the checksum over the whole buffer and the two addresses is right.
    pub fn verify_checksum(&self, src: IpAddr, dst: IpAddr) -> bool {
        bytes::checksum(bytes::sum_with_addresses(self.buffer.as_ref(), src, dst, PROTOCOL_UDP)) == 0
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Sets the source port.
    pub fn set_src_port(&mut self, port: u16) {
        bytes::set(self.buffer.as_mut(), field::SOURCE, &port.to_be_bytes());
    }

    /// Sets the destination port.
    pub fn set_dst_port(&mut self, port: u16) {
        bytes::set(self.buffer.as_mut(), field::DESTINATION, &port.to_be_bytes());
    }

    /// Sets the length of header and payload in bytes.
    pub fn set_len(&mut self, len: u16) {
        bytes::set(self.buffer.as_mut(), field::LENGTH, &len.to_be_bytes());
    }

    /// Sets the checksum.
    pub fn set_checksum(&mut self, checksum: u16) {
        bytes::set(self.buffer.as_mut(), field::CHECKSUM, &checksum.to_be_bytes());
    }

    /// Computes and sets the checksum over the whole buffer. A sum of 0 is sent as its other form (RFC 768).
    pub fn fill_checksum(&mut self, src: IpAddr, dst: IpAddr) {
        self.set_checksum(0);
        let sum = bytes::sum_with_addresses(self.buffer.as_ref(), src, dst, PROTOCOL_UDP);
        self.set_checksum(match bytes::checksum(sum) {
            0 => u16::MAX,
            checksum => checksum,
        });
    }
}

/// What the UDP header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// The source port.
    pub src_port: u16,
    /// The destination port.
    pub dst_port: u16,
    /// Bytes after this header.
    pub payload_len: usize,
}

impl Repr {
    /// Writes the header, without a checksum.
    ///
    /// # Errors
    /// [`Error::PayloadTooLong`] if the payload is longer than [`MAX_PAYLOAD`].
    pub fn emit<T: AsRef<[u8]> + AsMut<[u8]>>(&self, packet: &mut Packet<T>) -> Result<(), Error> {
        if self.payload_len > MAX_PAYLOAD {
            return Err(Error::PayloadTooLong(self.payload_len));
        }
        packet.set_src_port(self.src_port);
        packet.set_dst_port(self.dst_port);
        packet.set_len((HEADER_LEN + self.payload_len) as u16);
        packet.set_checksum(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const REPR: Repr = Repr { src_port: 50000, dst_port: PORT_VXLAN, payload_len: 4 };

    #[test]
    fn emit() {
        let mut out = [0xff; 8];
        REPR.emit(&mut Packet::new_unchecked(&mut out)).unwrap();
        assert_eq!(out, [0xc3, 0x50, 0x12, 0xb5, 0, 12, 0, 0]);
        let packet = Packet::new_unchecked(&out);
        assert_eq!((packet.src_port(), packet.dst_port(), packet.len()), (50000, 4789, 12));
        assert!(!packet.is_empty());
        let long = Repr { payload_len: MAX_PAYLOAD + 1, ..REPR };
        let refused = long.emit(&mut Packet::new_unchecked(&mut out));
        assert_eq!(refused, Err(Error::PayloadTooLong(MAX_PAYLOAD + 1)));
    }

    #[test]
    fn checksum() {
        let mut out = [0; 12];
        REPR.emit(&mut Packet::new_unchecked(&mut out[..])).unwrap();
        let ends: [(IpAddr, IpAddr); 2] = [
            (Ipv4Addr::new(192, 0, 2, 1).into(), Ipv4Addr::new(192, 0, 2, 2).into()),
            (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into()),
        ];
        for (src, dst) in ends {
            for last in 0..=u16::MAX {
                // Every sum there is: among them the one whose checksum would be 0.
                out[10..].copy_from_slice(&last.to_be_bytes());
                let mut packet = Packet::new_unchecked(&mut out[..]);
                packet.fill_checksum(src, dst);
                assert!(packet.checksum() != 0 && packet.verify_checksum(src, dst));
            }
        }
    }
}
