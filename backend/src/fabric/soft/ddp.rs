//! DDP (RFC 5041): which buffer a segment belongs to, and where in it.
//!
//! ```text
//! tagged     | T L rsvd DV (1) | ULP (1) | steering tag (4) | tagged offset (8) |
//! untagged   | T L rsvd DV (1) | ULP (1) | ULP (4) | queue (4) | message number (4) | message offset (4) |
//! ```

#![forbid(unsafe_code)]

/// Length of a tagged header.
pub const TAGGED_LEN: usize = 14;

/// Length of an untagged header.
pub const UNTAGGED_LEN: usize = 18;

const TAGGED: u8 = 0x80;
const LAST: u8 = 0x40;
const VERSION_MASK: u8 = 0x03;
const VERSION: u8 = 1;

/// A segment's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// Names the receiver's memory.
    Tagged {
        /// The message ends with this segment.
        last: bool,
        /// The upper layer's byte.
        ulp: u8,
        /// Steering tag.
        tag: u32,
        /// Where in the tagged buffer.
        offset: u64,
    },
    /// Goes to the next buffer of a queue.
    Untagged {
        /// The message ends with this segment.
        last: bool,
        /// The upper layer's byte.
        ulp: u8,
        /// Queue number.
        queue: u32,
        /// Message sequence number, from 1.
        msn: u32,
        /// Where in the message.
        offset: u32,
    },
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// Shorter than a header.
    Short,
    /// A version that is not 1.
    Version {
        /// Whether in a tagged segment.
        tagged: bool,
    },
}

/// The length of the header that begins with this byte.
pub fn header_len(first: u8) -> usize {
    if first & TAGGED != 0 { TAGGED_LEN } else { UNTAGGED_LEN }
}

impl Header {
    /// Reads the header at the beginning of a ULPDU.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let &first = bytes.first().ok_or(Error::Short)?;
        let bytes = bytes.get(..header_len(first)).ok_or(Error::Short)?;
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (tagged, last, ulp) = (first & TAGGED != 0, first & LAST != 0, bytes[1]);
        if first & VERSION_MASK != VERSION {
            return Err(Error::Version { tagged });
        }
        Ok(if tagged {
            let offset = u64::from(word(6)) << 32 | u64::from(word(10));
            Self::Tagged { last, ulp, tag: word(2), offset }
        } else {
            Self::Untagged { last, ulp, queue: word(6), msn: word(10), offset: word(14) }
        })
    }

    /// Writes it.
    pub fn emit(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Tagged { last, ulp, tag, offset } => {
                let mut bytes = [0; TAGGED_LEN];
                bytes[0] = TAGGED | if last { LAST } else { 0 } | VERSION;
                bytes[1] = ulp;
                bytes[2..6].copy_from_slice(&tag.to_be_bytes());
                bytes[6..].copy_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&bytes);
            }
            Self::Untagged { last, ulp, queue, msn, offset } => {
                let mut bytes = [0; UNTAGGED_LEN];
                bytes[0] = if last { LAST } else { 0 } | VERSION;
                bytes[1] = ulp;
                bytes[6..10].copy_from_slice(&queue.to_be_bytes());
                bytes[10..14].copy_from_slice(&msn.to_be_bytes());
                bytes[14..].copy_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emitted(header: Header) -> Vec<u8> {
        let mut out = Vec::new();
        header.emit(&mut out);
        out
    }

    #[test]
    fn headers_survive_the_wire() {
        let tagged = Header::Tagged { last: true, ulp: 0x40, tag: 0x0102_0304, offset: 1 << 60 | 7 };
        let untagged = Header::Untagged { last: false, ulp: 0x43, queue: 2, msn: u32::MAX, offset: 9 };
        for (header, len) in [(tagged, TAGGED_LEN), (untagged, UNTAGGED_LEN)] {
            let bytes = emitted(header);
            assert_eq!((bytes.len(), header_len(bytes[0])), (len, len));
            assert_eq!(Header::parse(&bytes), Ok(header));
            for cut in 0..len {
                assert_eq!(Header::parse(&bytes[..cut]), Err(Error::Short));
            }
        }
    }

    #[test]
    fn the_figure_is_right() {
        let bytes = emitted(Header::Tagged { last: true, ulp: 0x40, tag: 1, offset: 2 });
        assert_eq!(bytes, [0xc1, 0x40, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]);
    }

    #[test]
    fn other_versions_are_refused() {
        let mut bytes = emitted(Header::Tagged { last: true, ulp: 0, tag: 1, offset: 2 });
        bytes[0] = bytes[0] & !3 | 2;
        assert_eq!(Header::parse(&bytes), Err(Error::Version { tagged: true }));
    }
}
