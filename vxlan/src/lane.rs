//! The lane's TCP option: which stay on the ring a segment belongs to, and where that stay begins.
//!
//! It is an experimental option with a 32-bit identifier (RFC 6994, section 3):
//!
//! ```text
//!  0               1               2               3
//! +---------------+---------------+---------------+---------------+
//! |   kind 253    | length 12, 20 |        identifier "vs"        |
//! +---------------+---------------+---------------+---------------+
//! |        identifier "kt"        |  version 1    |  escape byte  |
//! +---------------+---------------+---------------+---------------+
//! |                          generation                           |
//! +---------------+---------------+---------------+---------------+
//! |                   start of the stay, 64 bits:                 |
//! |            only in a segment with SYN, then length 20         |
//! +---------------+---------------+---------------+---------------+
//! ```
//!
//! Both lengths are whole words, so a header needs no padding. Without a start there is no escape byte either,
//! and its place is zero.

use crate::{Error, bytes};

mod field {
    use crate::bytes::Field;

    pub const KIND: usize = 0;
    pub const LENGTH: usize = 1;
    pub const IDENTIFIER: Field = 2..6;
    pub const VERSION: usize = 6;
    pub const ESCAPE: usize = 7;
    pub const GENERATION: Field = 8..12;
    pub const PLAIN_END: usize = GENERATION.end;
    pub const START: Field = 12..20;
    pub const OPEN_END: usize = START.end;
}

const OPTION_END: u8 = 0;
const OPTION_NOTHING: u8 = 1;

/// The TCP option kind for experiments (RFC 6994, section 3).
pub const KIND: u8 = 253;

/// The experiment identifier that makes such an option the lane's (RFC 6994, section 3). It is not registered.
pub const IDENTIFIER: [u8; 4] = *b"vskt";

/// The version of the option's layout.
pub const VERSION: u8 = 1;

/// Length of the option in a segment without SYN.
pub const PLAIN_LEN: usize = field::PLAIN_END;

/// Length of the option in a segment with SYN.
pub const OPEN_LEN: usize = field::OPEN_END;

/// The stay a segment belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stay {
    /// Its number among the connection's stays.
    pub generation: u32,
    /// How it begins: in a segment with SYN, and in no other.
    pub open: Option<StayOpen>,
}

/// How a stay begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StayOpen {
    /// The offset in the stream of its first byte.
    pub start: u64,
    /// The byte that, on the anchor, will end it.
    pub escape: u8,
}

impl Stay {
    /// Length of the option that says this.
    pub const fn option_len(&self) -> usize {
        if self.open.is_some() { OPEN_LEN } else { PLAIN_LEN }
    }

    /// Reads a TCP option, kind and length included. `None`: it is not the lane's.
    ///
    /// # Errors
    /// [`Error::LaneLength`], [`Error::LaneVersion`], [`Error::LaneReserved`].
    pub fn parse(option: &[u8]) -> Result<Option<Stay>, Error> {
        if option.first() != Some(&KIND) || option.get(field::IDENTIFIER) != Some(&IDENTIFIER[..]) {
            return Ok(None);
        }
        if option.len() != PLAIN_LEN && option.len() != OPEN_LEN {
            return Err(Error::LaneLength(option[field::LENGTH]));
        }
        if option[field::VERSION] != VERSION {
            return Err(Error::LaneVersion(option[field::VERSION]));
        }
        let escape = option[field::ESCAPE];
        let open = (option.len() == OPEN_LEN)
            .then(|| StayOpen { start: u64::from_be_bytes(bytes::array(option, field::START)), escape });
        if open.is_none() && escape != 0 {
            return Err(Error::LaneReserved);
        }
        Ok(Some(Stay { generation: bytes::u32(option, field::GENERATION), open }))
    }

    /// Goes through a header's options (RFC 9293, section 3.2) to the lane's, which must be there once. Others are
    /// skipped.
    ///
    /// # Errors
    /// [`Error::OptionLength`], [`Error::OptionPadding`], [`Error::LaneMissing`], [`Error::LaneTwice`], and those
    /// of [`Stay::parse`].
    pub fn find(options: &[u8]) -> Result<Stay, Error> {
        let (mut found, mut rest) = (None, options);
        while let Some((&kind, after)) = rest.split_first() {
            match kind {
                OPTION_END if after.iter().any(|&byte| byte != 0) => return Err(Error::OptionPadding),
                OPTION_END => break,
                OPTION_NOTHING => rest = after,
                _ => {
                    let (option, next) = split_option(rest)?;
                    if let Some(stay) = Stay::parse(option)?
                        && found.replace(stay).is_some()
                    {
                        return Err(Error::LaneTwice);
                    }
                    rest = next;
                }
            }
        }
        found.ok_or(Error::LaneMissing)
    }

    /// Writes the option at the beginning of a buffer.
    ///
    /// # Panics
    /// If the buffer is shorter than [`Stay::option_len`].
    pub fn emit(&self, buffer: &mut [u8]) {
        let option = &mut buffer[..self.option_len()];
        option[field::KIND] = KIND;
        option[field::LENGTH] = option.len() as u8;
        bytes::set(option, field::IDENTIFIER, &IDENTIFIER);
        option[field::VERSION] = VERSION;
        option[field::ESCAPE] = self.open.map_or(0, |open| open.escape);
        bytes::set(option, field::GENERATION, &self.generation.to_be_bytes());
        if let Some(open) = self.open {
            bytes::set(option, field::START, &open.start.to_be_bytes());
        }
    }
}

/// The first option, of a kind that has a length, and what follows it.
fn split_option(options: &[u8]) -> Result<(&[u8], &[u8]), Error> {
    let len = options.get(field::LENGTH).copied().unwrap_or(0);
    match options.split_at_checked(len.into()) {
        Some((option, rest)) if option.len() > field::LENGTH => Ok((option, rest)),
        _ => Err(Error::OptionLength(len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: [u8; 12] = [253, 12, b'v', b's', b'k', b't', 1, 0, 0, 0, 0, 7];
    const OPEN: [u8; 20] = [253, 20, b'v', b's', b'k', b't', 1, 0x1b, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0x10, 0];
    const STAY: Stay = Stay { generation: 7, open: None };
    const STAY_OPEN: Stay =
        Stay { generation: 7, open: Some(StayOpen { start: 0x1_0000_1000, escape: 0x1b }) };

    #[test]
    fn parse_and_emit() {
        for (bytes, stay) in [(&PLAIN[..], STAY), (&OPEN[..], STAY_OPEN)] {
            assert_eq!(Stay::parse(bytes), Ok(Some(stay)));
            let mut out = [0xff; OPEN_LEN];
            stay.emit(&mut out);
            assert_eq!(&out[..stay.option_len()], bytes);
        }
    }

    #[test]
    fn other_options_are_none_of_ours() {
        for index in [0, 2, 3, 4, 5] {
            let mut bytes = PLAIN;
            bytes[index] ^= 1;
            assert_eq!(Stay::parse(&bytes), Ok(None), "byte {index}");
        }
        for len in 0..6 {
            assert_eq!(Stay::parse(&PLAIN[..len]), Ok(None));
        }
    }

    #[test]
    fn each_field_has_its_error() {
        let parse = |index: usize, value, len: usize| {
            let mut bytes = OPEN;
            (bytes[1], bytes[7]) = (len as u8, 0);
            bytes[index] = value;
            Stay::parse(&bytes[..len])
        };
        for len in (6..OPEN_LEN).filter(|&len| len != PLAIN_LEN) {
            assert_eq!(parse(0, KIND, len), Err(Error::LaneLength(len as u8)));
        }
        assert_eq!(parse(6, 2, PLAIN_LEN), Err(Error::LaneVersion(2)));
        assert_eq!(parse(7, 1, PLAIN_LEN), Err(Error::LaneReserved));
        assert_eq!(parse(0, KIND, PLAIN_LEN), Ok(Some(STAY)));
    }

    #[test]
    fn is_found_among_others() {
        let mss: &[u8] = &[2, 4, 5, 0xb4];
        for options in [
            &PLAIN.to_vec(),
            &[mss, &PLAIN].concat(),
            &[&[1, 1][..], &PLAIN, mss, &[1, 0]].concat(),
            &[&PLAIN[..], &[0, 0, 0, 0]].concat(),
            &[&[KIND, 4, 0xf9, 0x89][..], &PLAIN].concat(),
        ] {
            assert_eq!(Stay::find(options), Ok(STAY), "{options:?}");
        }
    }

    #[test]
    fn malformed_options() {
        assert_eq!(Stay::find(&[]), Err(Error::LaneMissing));
        assert_eq!(Stay::find(&[1, 1, 0, 0]), Err(Error::LaneMissing));
        assert_eq!(Stay::find(&[1, 0, 0, 1]), Err(Error::OptionPadding));
        assert_eq!(Stay::find(&[2, 0, 0, 0]), Err(Error::OptionLength(0)));
        assert_eq!(Stay::find(&[2, 1, 0, 0]), Err(Error::OptionLength(1)));
        assert_eq!(Stay::find(&[2, 5, 0, 0]), Err(Error::OptionLength(5)));
        assert_eq!(Stay::find(&[1, 1, 1, 2]), Err(Error::OptionLength(0)));
        assert_eq!(Stay::find(&PLAIN[..8]), Err(Error::OptionLength(12)));
        assert_eq!(Stay::find(&[PLAIN, PLAIN].concat()), Err(Error::LaneTwice));
    }
}
