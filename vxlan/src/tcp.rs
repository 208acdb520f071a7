//! The inner TCP header (RFC 9293, section 3.1): the lane's own protocol.
//!
//! # What differs from TCP
//!
//! * The sequence number is the low 32 bits of the payload's offset in the stream, counted from the connection's
//!   first byte. SYN says that a stay on the lane begins, and takes no sequence number; FIN says that the stream
//!   ends after this segment's payload, and takes none either.
//! * The window is scaled by [`WINDOW_SHIFT`], always (RFC 7323 would negotiate it).
//! * Each segment carries the lane's option (see [`lane`](crate::lane)). Other options are skipped.
//! * The checksum is sent as 0, and 0 is accepted as "not computed", as RFC 7348 does with the checksum of the
//!   outer UDP. The fabric below guarantees integrity, and summing a large payload would cost more than moving
//!   it. A checksum other than 0 has to be right. A correct sum that happens to be 0 passes unseen, as it may.
//! * Reserved bits, URG, ECE and CWR are refused rather than ignored: no backend sets them.

use core::net::IpAddr;

pub use crate::flags::Flags;
use crate::lane::Stay;
use crate::{Error, PROTOCOL_TCP, bytes};

mod field {
    use crate::bytes::Field;

    pub const SOURCE: Field = 0..2;
    pub const DESTINATION: Field = 2..4;
    pub const SEQUENCE: Field = 4..8;
    pub const ACKNOWLEDGEMENT: Field = 8..12;
    pub const DATA_OFFSET: usize = 12;
    pub const CONTROL: usize = 13;
    pub const WINDOW: Field = 14..16;
    pub const CHECKSUM: Field = 16..18;
    pub const URGENT: Field = 18..20;
    pub const END: usize = URGENT.end;
}

/// Length of a TCP header without options in bytes (RFC 9293, section 3.1).
pub const HEADER_LEN: usize = field::END;

/// Length of the longest TCP header a segment has.
pub const MAX_HEADER_LEN: usize = HEADER_LEN + crate::lane::OPEN_LEN;

/// The window field counts units of `1 << WINDOW_SHIFT` bytes (as in RFC 7323, section 2.2).
pub const WINDOW_SHIFT: u32 = 10;

/// The largest window a segment can announce; a larger one is announced as this.
pub const MAX_WINDOW: u32 = (u16::MAX as u32) << WINDOW_SHIFT;

const MIN_WORDS: u8 = (HEADER_LEN / 4) as u8;

/// A TCP header, and what follows it, in a buffer (RFC 9293, section 3.1).
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
    /// As [`Packet::check_len`].
    pub fn new_checked(buffer: T) -> Result<Packet<T>, Error> {
        let packet = Packet { buffer };
        packet.check_len()?;
        Ok(packet)
    }

    /// Whether the buffer holds the whole header, options included.
    ///
    /// # Errors
    /// [`Error::TcpTruncated`], [`Error::TcpDataOffset`].
    pub fn check_len(&self) -> Result<(), Error> {
        let len = self.buffer.as_ref().len();
        if len < HEADER_LEN {
            return Err(Error::TcpTruncated);
        }
        if self.data_offset() < MIN_WORDS {
            return Err(Error::TcpDataOffset(self.data_offset()));
        }
        if len < self.header_len() { Err(Error::TcpTruncated) } else { Ok(()) }
    }

    /// The source port.
    pub fn src_port(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::SOURCE)
    }

    /// The destination port.
    pub fn dst_port(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::DESTINATION)
    }

    /// The sequence number.
    pub fn seq(&self) -> u32 {
        bytes::u32(self.buffer.as_ref(), field::SEQUENCE)
    }

    /// The acknowledgement number.
    pub fn ack(&self) -> u32 {
        bytes::u32(self.buffer.as_ref(), field::ACKNOWLEDGEMENT)
    }

    /// The data offset: the header's length, options included, in words of four bytes.
    pub fn data_offset(&self) -> u8 {
        self.buffer.as_ref()[field::DATA_OFFSET] >> 4
    }

    /// The header's length, options included, in bytes.
    pub fn header_len(&self) -> usize {
        usize::from(self.data_offset()) * 4
    }

    /// The four reserved bits.
    pub fn reserved(&self) -> u8 {
        self.buffer.as_ref()[field::DATA_OFFSET] & 0x0f
    }

    /// The eight control bits.
    pub fn control_bits(&self) -> u8 {
        self.buffer.as_ref()[field::CONTROL]
    }

    /// The window, as it stands in the header.
    pub fn window(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::WINDOW)
    }

    /// The checksum.
    pub fn checksum(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::CHECKSUM)
    }

    /// The urgent pointer.
    pub fn urgent(&self) -> u16 {
        bytes::u16(self.buffer.as_ref(), field::URGENT)
    }

    /// The options and the padding after them.
    pub fn options(&self) -> &[u8] {
        &self.buffer.as_ref()[HEADER_LEN..self.header_len()]
    }

    /// Whether the checksum over the whole buffer and the two addresses is right.
    pub fn verify_checksum(&self, src: IpAddr, dst: IpAddr) -> bool {
        bytes::checksum(bytes::sum_with_addresses(self.buffer.as_ref(), src, dst, PROTOCOL_TCP)) == 0
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

    /// Sets the sequence number.
    pub fn set_seq(&mut self, seq: u32) {
        bytes::set(self.buffer.as_mut(), field::SEQUENCE, &seq.to_be_bytes());
    }

    /// Sets the acknowledgement number.
    pub fn set_ack(&mut self, ack: u32) {
        bytes::set(self.buffer.as_mut(), field::ACKNOWLEDGEMENT, &ack.to_be_bytes());
    }

    /// Sets the data offset in words of four bytes, and the reserved bits, each of which has four bits.
    pub fn set_data_offset_and_reserved(&mut self, words: u8, reserved: u8) {
        self.buffer.as_mut()[field::DATA_OFFSET] = words << 4 | reserved & 0x0f;
    }

    /// Sets the eight control bits.
    pub fn set_control_bits(&mut self, bits: u8) {
        self.buffer.as_mut()[field::CONTROL] = bits;
    }

    /// Sets the window, as it stands in the header.
    pub fn set_window(&mut self, window: u16) {
        bytes::set(self.buffer.as_mut(), field::WINDOW, &window.to_be_bytes());
    }

    /// Sets the checksum.
    pub fn set_checksum(&mut self, checksum: u16) {
        bytes::set(self.buffer.as_mut(), field::CHECKSUM, &checksum.to_be_bytes());
    }

    /// Sets the urgent pointer.
    pub fn set_urgent(&mut self, pointer: u16) {
        bytes::set(self.buffer.as_mut(), field::URGENT, &pointer.to_be_bytes());
    }

    /// The options and the padding after them, to be written. The data offset must have been set.
    pub fn options_mut(&mut self) -> &mut [u8] {
        let len = self.header_len();
        &mut self.buffer.as_mut()[HEADER_LEN..len]
    }

    /// Computes and sets the checksum over the whole buffer, for a capture or another reader than a backend.
    pub fn fill_checksum(&mut self, src: IpAddr, dst: IpAddr) {
        self.set_checksum(0);
        let sum = bytes::sum_with_addresses(self.buffer.as_ref(), src, dst, PROTOCOL_TCP);
        self.set_checksum(bytes::checksum(sum));
    }
}

/// What the TCP header of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// The source port.
    pub src_port: u16,
    /// The destination port.
    pub dst_port: u16,
    /// The low 32 bits of the payload's offset in the stream.
    pub seq: u32,
    /// The low 32 bits of the offset up to which the other stream has been received.
    pub ack: u32,
    /// How many bytes more may come, rounded down to the field's unit.
    pub window: u32,
    /// The control bits.
    pub flags: Flags,
    /// The stay this segment belongs to.
    pub stay: Stay,
}

impl Repr {
    /// Length of the header that says this, in bytes.
    pub const fn header_len(&self) -> usize {
        HEADER_LEN + self.stay.option_len()
    }

    /// Reads and checks a header, its checksum aside.
    ///
    /// # Errors
    /// [`Error::TcpTruncated`], [`Error::TcpDataOffset`], [`Error::TcpReserved`], those of
    /// [`Flags::from_bits`], [`Error::TcpUrgent`], those of [`Stay::find`], [`Error::LaneOpenMissing`],
    /// [`Error::LaneOpenWithoutSyn`]; of several, the first in this order.
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Result<Repr, Error> {
        packet.check_len()?;
        if packet.reserved() != 0 {
            return Err(Error::TcpReserved);
        }
        let flags = Flags::from_bits(packet.control_bits())?;
        if packet.urgent() != 0 {
            return Err(Error::TcpUrgent);
        }
        let repr = Repr {
            src_port: packet.src_port(),
            dst_port: packet.dst_port(),
            seq: packet.seq(),
            ack: packet.ack(),
            window: u32::from(packet.window()) << WINDOW_SHIFT,
            flags,
            stay: Stay::find(packet.options())?,
        };
        repr.check_open()?;
        Ok(repr)
    }

    /// Writes the header: every byte of it, whatever the buffer held.
    ///
    /// # Errors
    /// [`Error::SynFin`], [`Error::SynRst`], [`Error::LaneOpenMissing`], [`Error::LaneOpenWithoutSyn`].
    pub fn emit<T: AsRef<[u8]> + AsMut<[u8]>>(&self, packet: &mut Packet<T>) -> Result<(), Error> {
        Flags::from_bits(self.flags.bits())?;
        self.check_open()?;
        packet.set_src_port(self.src_port);
        packet.set_dst_port(self.dst_port);
        packet.set_seq(self.seq);
        packet.set_ack(self.ack);
        packet.set_data_offset_and_reserved((self.header_len() / 4) as u8, 0);
        packet.set_control_bits(self.flags.bits());
        packet.set_window((self.window.min(MAX_WINDOW) >> WINDOW_SHIFT) as u16);
        packet.set_checksum(0);
        packet.set_urgent(0);
        self.stay.emit(packet.options_mut());
        Ok(())
    }

    fn check_open(&self) -> Result<(), Error> {
        match (self.flags.contains(Flags::SYN), self.stay.open) {
            (true, None) => Err(Error::LaneOpenMissing),
            (false, Some(_)) => Err(Error::LaneOpenWithoutSyn),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const BYTES: [u8; 32] = [
        0x9c, 0x40, 0x18, 0xeb, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0x80, 0x18, 0x0f, 0xff, 0, 0, 0, 0, //
        253, 12, b'v', b's', b'k', b't', 1, 0, 0, 0, 0, 7,
    ];
    const REPR: Repr = Repr {
        src_port: 40000,
        dst_port: 6379,
        seq: 0x1000,
        ack: 0x2000,
        window: 0xfff << WINDOW_SHIFT,
        flags: Flags::PSH.with(Flags::ACK),
        stay: Stay { generation: 7, open: None },
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
        let mut out = [0xff; 32];
        REPR.emit(&mut Packet::new_unchecked(&mut out)).unwrap();
        assert_eq!(out, BYTES);
    }

    #[test]
    fn each_field_has_its_error() {
        assert_eq!(changed(|p| p.set_data_offset_and_reserved(4, 0)), Err(Error::TcpDataOffset(4)));
        assert_eq!(changed(|p| p.set_data_offset_and_reserved(9, 0)), Err(Error::TcpTruncated));
        assert_eq!(changed(|p| p.set_data_offset_and_reserved(5, 0)), Err(Error::LaneMissing));
        assert_eq!(changed(|p| p.set_data_offset_and_reserved(8, 1)), Err(Error::TcpReserved));
        assert_eq!(changed(|p| p.set_control_bits(0x30)), Err(Error::TcpControlBits(0x30)));
        assert_eq!(changed(|p| p.set_control_bits(0x03)), Err(Error::SynFin));
        assert_eq!(changed(|p| p.set_control_bits(0x06)), Err(Error::SynRst));
        assert_eq!(changed(|p| p.set_control_bits(0x02)), Err(Error::LaneOpenMissing));
        assert_eq!(changed(|p| p.set_urgent(1)), Err(Error::TcpUrgent));
    }

    #[test]
    fn window_is_rounded_down_and_capped() {
        let window = |window| {
            let mut out = [0; 32];
            Repr { window, ..REPR }.emit(&mut Packet::new_unchecked(&mut out)).unwrap();
            parse(&out).unwrap().window
        };
        for (announced, read) in [(0, 0), (1023, 0), (1024, 1024), (2047, 1024), (u32::MAX, MAX_WINDOW)] {
            assert_eq!(window(announced), read);
        }
    }

    #[test]
    fn checksum_covers_segment_and_addresses() {
        let v4 = (Ipv4Addr::new(10, 0, 0, 1).into(), Ipv4Addr::new(10, 0, 0, 2).into());
        let v6 = (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into());
        for (src, dst) in [v4, v6] {
            let mut bytes = [&BYTES[..], b"odd"].concat();
            Packet::new_unchecked(&mut bytes[..]).fill_checksum(src, dst);
            assert!(Packet::new_unchecked(&bytes[..]).verify_checksum(src, dst));
            assert!(!Packet::new_unchecked(&bytes[..]).verify_checksum(src, src));
            bytes[34] ^= 1;
            assert!(!Packet::new_unchecked(&bytes[..]).verify_checksum(src, dst));
        }
    }

    #[test]
    fn truncated() {
        for len in 0..BYTES.len() {
            assert_eq!(parse(&BYTES[..len]), Err(Error::TcpTruncated));
            assert_eq!(Packet::new_checked(&BYTES[..len]).err(), Some(Error::TcpTruncated));
        }
    }

    #[test]
    fn emit_refuses_what_parse_refuses() {
        let emit = |repr: Repr| repr.emit(&mut Packet::new_unchecked(&mut [0; MAX_HEADER_LEN]));
        let open = Some(crate::StayOpen { start: 0, escape: 0 });
        assert_eq!(emit(Repr { flags: Flags::SYN, ..REPR }), Err(Error::LaneOpenMissing));
        assert_eq!(emit(Repr { flags: Flags::SYN | Flags::FIN, ..REPR }), Err(Error::SynFin));
        assert_eq!(emit(Repr { flags: Flags::SYN | Flags::RST, ..REPR }), Err(Error::SynRst));
        assert_eq!(emit(Repr { stay: Stay { open, ..REPR.stay }, ..REPR }), Err(Error::LaneOpenWithoutSyn));
    }
}
