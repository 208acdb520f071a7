//! RDMAP (RFC 5040): what a DDP message means. Write, Send and Terminate; nothing else is spoken.

#![forbid(unsafe_code)]

use crate::fabric::Fault;

/// The untagged queue of SENDs.
pub const SEND_QUEUE: u32 = 0;

/// The untagged queue of the one TERMINATE.
pub const TERMINATE_QUEUE: u32 = 2;

const VERSION: u8 = 1 << 6;
const VERSION_MASK: u8 = 3 << 6;
const OPCODE_MASK: u8 = 0x0f;

/// The operations we speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// Tagged: place these bytes.
    Write,
    /// Untagged: a message.
    Send,
    /// Untagged: the stream is over, and why.
    Terminate,
}

/// What is wrong with a control byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// A version that is not 1.
    Version,
    /// An operation we do not speak.
    Opcode,
}

impl Opcode {
    /// The control byte.
    pub fn control(self) -> u8 {
        VERSION
            | match self {
                Self::Write => 0,
                Self::Send => 3,
                Self::Terminate => 7,
            }
    }

    /// Reads a control byte.
    pub fn parse(control: u8) -> Result<Self, Error> {
        if control & VERSION_MASK != VERSION {
            return Err(Error::Version);
        }
        match control & OPCODE_MASK {
            0 => Ok(Self::Write),
            3 => Ok(Self::Send),
            7 => Ok(Self::Terminate),
            _ => Err(Error::Opcode),
        }
    }
}

/// (layer, type, code) of a fault, as the RFCs number them.
fn code(fault: Fault) -> (u8, u8, u8) {
    match fault {
        Fault::InvalidTag => (1, 1, 0),
        Fault::Bounds => (1, 1, 1),
        Fault::WrongDomain => (1, 1, 2),
        Fault::Wrap => (1, 1, 3),
        Fault::AccessRights => (0, 1, 2),
        // Never ours; the protection class of errors without a cause of its own.
        Fault::Refused => (0, 1, 0xff),
        Fault::Other { layer, kind, code } => (layer, kind, code),
    }
}

/// RDMAP: a version that is not 1.
pub const BAD_VERSION: Fault = Fault::Other { layer: 0, kind: 2, code: 5 };
/// RDMAP: an operation that does not belong there.
pub const BAD_OPCODE: Fault = Fault::Other { layer: 0, kind: 2, code: 6 };
/// DDP: a version that is not 1, in a tagged segment.
pub const BAD_TAGGED_VERSION: Fault = Fault::Other { layer: 1, kind: 1, code: 4 };
/// DDP: no such queue.
pub const BAD_QUEUE: Fault = Fault::Other { layer: 1, kind: 2, code: 1 };
/// DDP: not the next message.
pub const BAD_MSN: Fault = Fault::Other { layer: 1, kind: 2, code: 3 };
/// DDP: not the next byte of the message.
pub const BAD_OFFSET: Fault = Fault::Other { layer: 1, kind: 2, code: 4 };
/// DDP: the message is longer than we take.
pub const TOO_LONG: Fault = Fault::Other { layer: 1, kind: 2, code: 5 };
/// DDP: a version that is not 1, in an untagged segment.
pub const BAD_UNTAGGED_VERSION: Fault = Fault::Other { layer: 1, kind: 2, code: 6 };
/// MPA: the checksum is wrong.
pub const BAD_CRC: Fault = Fault::Other { layer: 2, kind: 0, code: 2 };

/// The body of a TERMINATE.
pub struct Terminate;

impl Terminate {
    /// Writes one that quotes the offending segment's DDP header: its length field (M) and the header itself (D).
    pub fn emit(fault: Fault, segment_len: u16, header: &[u8], out: &mut Vec<u8>) {
        let (layer, kind, code) = code(fault);
        let quoted = if header.is_empty() { 0 } else { 0b110 << 5 };
        out.extend([layer << 4 | kind & 0x0f, code, quoted, 0]);
        if !header.is_empty() {
            out.extend(segment_len.to_be_bytes());
            out.extend(header);
        }
    }

    /// What it complains of; `None` if it is too short to say.
    pub fn parse(body: &[u8]) -> Option<Fault> {
        let [first, code, ..] = *body else { return None };
        let (layer, kind) = (first >> 4, first & 0x0f);
        Some(match (layer, kind, code) {
            (0 | 1, 1, 0) => Fault::InvalidTag,
            (0 | 1, 1, 1) => Fault::Bounds,
            (0, 1, 2) => Fault::AccessRights,
            (1, 1, 2) | (0, 1, 3) => Fault::WrongDomain,
            (1, 1, 3) | (0, 1, 4) => Fault::Wrap,
            _ => Fault::Other { layer, kind, code },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opcodes_survive_and_others_are_refused() {
        for opcode in [Opcode::Write, Opcode::Send, Opcode::Terminate] {
            assert_eq!(Opcode::parse(opcode.control()), Ok(opcode));
        }
        assert_eq!(Opcode::parse(VERSION | 1), Err(Error::Opcode));
        assert_eq!(Opcode::parse(0x80), Err(Error::Version));
    }

    #[test]
    fn faults_survive_the_wire() {
        let faults =
            [Fault::InvalidTag, Fault::Bounds, Fault::WrongDomain, Fault::Wrap, Fault::AccessRights, BAD_CRC];
        for fault in faults {
            let mut out = Vec::new();
            Terminate::emit(fault, 20, &[0xc1; 14], &mut out);
            assert_eq!((Terminate::parse(&out), out.len()), (Some(fault), 20));
        }
        assert_eq!(Terminate::parse(&[0x11]), None);
    }
}
