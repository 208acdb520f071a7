//! MPA (RFC 5044): how messages are marked off in a TCP stream, and how the two ends meet.
//!
//! Markers are not used (we never ask for them and turn away who does); CRC32c is used if either end asks.
//!
//! ```text
//! start-up frame   | key (16) | M C R, reserved (1) | revision (1) | private data length (2) | private data |
//! FPDU             | ULPDU length (2) | ULPDU | 0 to 3 bytes of padding | CRC32c, or zero (4) |
//! ```

#![forbid(unsafe_code)]

use crate::fabric::Secret;

/// Key, flags, revision, length.
pub const FRAME_HEADER: usize = 20;

/// The RFC's bound on private data.
pub const MAX_PRIVATE: usize = 512;

/// The length field of an FPDU.
pub const LENGTH_LEN: usize = 2;

/// The longest ULPDU that the length field can tell.
pub const MAX_ULPDU: usize = u16::MAX as usize;

/// The longest FPDU.
pub const MAX_FPDU: usize = LENGTH_LEN + MAX_ULPDU + 3 + CRC_LEN;

const CRC_LEN: usize = 4;
const REVISION: u8 = 1;
const REQUEST_KEY: &[u8; 16] = b"MPA ID Req Frame";
const REPLY_KEY: &[u8; 16] = b"MPA ID Rep Frame";
const MARKERS: u8 = 0x80;
const CRC: u8 = 0x40;
const REJECT: u8 = 0x20;

/// Which of the two start-up frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The dialler's.
    Request,
    /// The listener's.
    Reply,
}

impl Kind {
    fn key(self) -> &'static [u8; 16] {
        match self {
            Self::Request => REQUEST_KEY,
            Self::Reply => REPLY_KEY,
        }
    }
}

/// The header of a start-up frame, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The sender wants checksums.
    pub crc: bool,
    /// The listener wants nothing of it.
    pub reject: bool,
    /// How many bytes of private data follow.
    pub private: usize,
}

/// What is wrong with a start-up frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not MPA.
    #[error("the key is not MPA's")]
    Key,
    /// A revision that is not 1.
    #[error("MPA revision {0} is not spoken")]
    Revision(u8),
    /// Markers are asked for.
    #[error("MPA markers are not spoken")]
    Markers,
    /// More private data than the RFC allows.
    #[error("{0} bytes of private data are too many")]
    Oversized(usize),
}

impl Frame {
    /// Reads a header.
    pub fn parse(kind: Kind, bytes: &[u8; FRAME_HEADER]) -> Result<Self, FrameError> {
        let [key @ .., flags, revision, high, low] = bytes;
        if key != kind.key() {
            return Err(FrameError::Key);
        }
        if *revision != REVISION {
            return Err(FrameError::Revision(*revision));
        }
        if flags & MARKERS != 0 {
            return Err(FrameError::Markers);
        }
        let private = usize::from(u16::from_be_bytes([*high, *low]));
        if private > MAX_PRIVATE {
            return Err(FrameError::Oversized(private));
        }
        Ok(Self { crc: flags & CRC != 0, reject: flags & REJECT != 0, private })
    }

    /// Writes a whole frame.
    pub fn emit(kind: Kind, crc: bool, private: &[u8], out: &mut Vec<u8>) {
        debug_assert!(private.len() <= MAX_PRIVATE);
        out.extend(kind.key());
        out.extend([if crc { CRC } else { 0 }, REVISION]);
        out.extend((private.len() as u16).to_be_bytes());
        out.extend(private);
    }
}

/// The version of our private data and of what follows it.
pub const BINDING_VERSION: u16 = 1;

/// The private data of a request: which agreement on the control connection this is the data connection of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// The tenant network.
    pub vni: u32,
    /// The one-time secret.
    pub secret: Secret,
}

/// What is wrong with private data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindingError {
    /// Another length than ours.
    Length,
    /// Another version.
    Version,
}

impl Binding {
    /// Version, VNI, secret: less than the 56 bytes that InfiniBand's connection manager would carry.
    pub const LEN: usize = 2 + 4 + 32;

    /// Writes it.
    pub fn emit(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..2].copy_from_slice(&BINDING_VERSION.to_be_bytes());
        out[2..6].copy_from_slice(&self.vni.to_be_bytes());
        out[6..].copy_from_slice(&self.secret);
        out
    }

    /// Reads it.
    pub fn parse(bytes: &[u8]) -> Result<Self, BindingError> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().map_err(|_| BindingError::Length)?;
        let [v0, v1, n0, n1, n2, n3, secret @ ..] = bytes;
        if u16::from_be_bytes([*v0, *v1]) != BINDING_VERSION {
            return Err(BindingError::Version);
        }
        Ok(Self { vni: u32::from_be_bytes([*n0, *n1, *n2, *n3]), secret: *secret })
    }
}

/// Padding after a ULPDU of `len` bytes: the FPDU without its CRC is a multiple of four.
pub fn padding(len: usize) -> usize {
    (LENGTH_LEN + len).wrapping_neg() % 4
}

/// Everything after a ULPDU of `len` bytes.
pub fn trailer(len: usize) -> usize {
    padding(len) + CRC_LEN
}

/// The FPDU of a ULPDU of `len` bytes.
pub fn fpdu(len: usize) -> usize {
    LENGTH_LEN + len + trailer(len)
}

/// Closes the FPDU that began at `start` of `out`: padding, and the CRC over all of it or zero.
pub fn close(out: &mut Vec<u8>, start: usize, crc: bool) {
    let len = out.len() - start - LENGTH_LEN;
    out.extend_from_slice(&[0; 3][..padding(len)]);
    let sum = if crc { crc32c::crc32c(&out[start..]) } else { 0 };
    out.extend_from_slice(&sum.to_le_bytes());
}

/// The trailer of an FPDU whose payload is not in private memory: padding and no CRC.
pub fn close_open_ended(out: &mut Vec<u8>, ulpdu: usize) {
    out.extend_from_slice(&[0; 3 + CRC_LEN][..trailer(ulpdu)]);
}

/// Whether a whole FPDU's CRC is right.
pub fn crc_matches(fpdu: &[u8]) -> bool {
    let Some((body, sum)) = fpdu.split_last_chunk::<CRC_LEN>() else { return false };
    crc32c::crc32c(body) == u32::from_le_bytes(*sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: Kind, crc: bool, private: &[u8]) -> [u8; FRAME_HEADER] {
        let mut out = Vec::new();
        Frame::emit(kind, crc, private, &mut out);
        assert_eq!(out.len(), FRAME_HEADER + private.len());
        *out.first_chunk().unwrap()
    }

    #[test]
    fn frames_survive_the_wire() {
        for kind in [Kind::Request, Kind::Reply] {
            let frame = Frame::parse(kind, &header(kind, true, b"abc")).unwrap();
            assert_eq!(frame, Frame { crc: true, reject: false, private: 3 });
        }
    }

    #[test]
    fn bad_frames_have_names() {
        let good = header(Kind::Request, false, b"");
        let with = |at: usize, byte: u8| {
            let mut bad = good;
            bad[at] = byte;
            Frame::parse(Kind::Request, &bad).unwrap_err()
        };
        assert_eq!(Frame::parse(Kind::Reply, &good), Err(FrameError::Key));
        assert_eq!(with(0, b'G'), FrameError::Key);
        assert_eq!(with(16, 0x80), FrameError::Markers);
        assert_eq!(with(17, 2), FrameError::Revision(2));
        assert_eq!(with(18, 3), FrameError::Oversized(768));
    }

    #[test]
    fn bindings_survive_and_are_checked() {
        let binding = Binding { vni: 100, secret: [3; 32] };
        let bytes = binding.emit();
        assert!(Binding::parse(&bytes).unwrap() == binding);
        assert_eq!(Binding::parse(&bytes[1..]).err(), Some(BindingError::Length));
        let mut bad = bytes;
        bad[1] = 9;
        assert_eq!(Binding::parse(&bad).err(), Some(BindingError::Version));
    }

    #[test]
    fn fpdus_are_padded_to_four() {
        for len in 0..9 {
            assert_eq!(fpdu(len) % 4, 0);
            assert!(padding(len) < 4);
        }
        assert_eq!(fpdu(14), 20);
    }

    #[test]
    fn crc_catches_a_flipped_bit() {
        let mut out = vec![0, 5];
        out.extend(b"hello");
        close(&mut out, 0, true);
        assert_eq!(out.len(), fpdu(5));
        assert!(crc_matches(&out));
        out[3] ^= 1;
        assert!(!crc_matches(&out));
    }
}
