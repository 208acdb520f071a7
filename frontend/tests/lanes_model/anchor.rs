//! The kernel's socket, one direction: a queue of real bytes that know where they come from.

use crate::world::{Broken, WIRE, require};
use vsocket_channel::lane::Rewind;

/// Most runs that may be under way: raw bytes, a frame, raw bytes, and the parts of a change.
const RUNS: usize = 5;

/// Successive bytes of one origin.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// The application's bytes, from this stream offset on.
    Tenant(u8),
    /// A REWIND's bytes, from this one on.
    Frame { generation: u8, resume: u8, escape: u8, last: bool, from: u8 },
}

impl Origin {
    fn skip(self, n: u8) -> Self {
        match self {
            Self::Tenant(from) => Self::Tenant(from + n),
            Self::Frame { generation, resume, escape, last, from } => {
                Self::Frame { generation, resume, escape, last, from: from + n }
            }
        }
    }

    fn byte(self, data: &[u8]) -> u8 {
        match self {
            Self::Tenant(at) => data[usize::from(at)],
            Self::Frame { generation, resume, escape, last, from } => {
                Rewind { generation: generation.into(), resume: resume.into(), last }.encode(escape)
                    [usize::from(from)]
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Anchor {
    runs: [(u8, Origin); RUNS],
    /// Bytes ever put in and taken out, as the kernel counts them.
    pub put: u64,
    pub taken: u64,
    /// The sender has shut it.
    pub fin: bool,
    /// It was reset.
    pub reset: bool,
}

const NOTHING: (u8, Origin) = (0, Origin::Tenant(0));

impl Default for Anchor {
    fn default() -> Self {
        Self { runs: [NOTHING; RUNS], put: 0, taken: 0, fin: false, reset: false }
    }
}

impl std::fmt::Display for Anchor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (len, origin) in self.runs.iter().filter(|(len, _)| *len > 0) {
            match origin {
                Origin::Tenant(from) => write!(f, "{from}..{} ", from + len)?,
                Origin::Frame { resume, from, .. } => write!(f, "R({resume})[{from}..{}] ", from + len)?,
            }
        }
        f.write_str(if self.reset {
            "RST"
        } else if self.fin {
            "FIN"
        } else {
            "·"
        })
    }
}

impl Anchor {
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(len, _)| u64::from(*len)).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.runs[0].0 == 0
    }

    pub fn put(&mut self, origin: Origin, n: u64) -> Result<(), Broken> {
        if n == 0 {
            return Ok(());
        }
        self.put += n;
        let used = self.runs.iter().filter(|(len, _)| *len > 0).count();
        if let Some((len, last)) = self.runs[..used].last_mut()
            && last.skip(*len) == origin
        {
            *len += n as u8;
            return Ok(());
        }
        require(used < RUNS, || "too much under way on the anchor".into())?;
        self.runs[used] = (n as u8, origin);
        Ok(())
    }

    /// Takes one byte away.
    pub fn take(&mut self) -> Origin {
        let (len, origin) = self.runs[0];
        assert!(len > 0, "the anchor is empty");
        self.taken += 1;
        self.runs[0] = (len - 1, origin.skip(1));
        if len == 1 {
            self.runs.rotate_left(1);
            self.runs[RUNS - 1] = NOTHING;
        }
        origin
    }

    /// The first `n` bytes, and where the first comes from.
    pub fn peek(&self, n: u64, data: &[u8]) -> (Vec<u8>, Origin) {
        let mut copy = *self;
        ((0..n).map(|_| copy.take().byte(data)).collect(), self.runs[0].1)
    }

    /// Bytes under way are lost, and nothing more passes.
    pub fn reset(&mut self) {
        *self = Self { reset: true, put: self.put, taken: self.taken, ..Self::default() };
    }

    /// Somebody takes everything and looks at nothing.
    pub fn drain(&mut self) {
        self.taken = WIRE;
        self.runs = [NOTHING; RUNS];
    }
}
