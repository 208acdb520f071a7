//! The streams, and each direction of a connection: what is sent, and how it is checked.

use super::{LARGEST, Result};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

/// splitmix64: every word a function of the seed and its place.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A size of 1 B to 1 MiB: mostly small, with most of the bytes in the large ones.
    pub fn size(&mut self) -> usize {
        let most = match self.below(10) {
            0..=3 => 64,
            4..=6 => 1500,
            7..=8 => 64 << 10,
            _ => LARGEST as u64,
        };
        1 + self.below(most) as usize
    }
}

/// The bytes that belong to a seed, from the first on.
pub struct Stream {
    pub words: Random,
    pub word: [u8; 8],
    pub used: usize,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Self { words: Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)), word: [0; 8], used: 8 }
    }

    pub fn fill(&mut self, mut out: &mut [u8]) {
        while !out.is_empty() {
            if self.used == 8 && out.len() >= 8 {
                let whole = out.len() & !7;
                let (now, rest) = out.split_at_mut(whole);
                for word in now.chunks_exact_mut(8) {
                    word.copy_from_slice(&self.words.next().to_le_bytes());
                }
                out = rest;
            } else {
                if self.used == 8 {
                    (self.word, self.used) = (self.words.next().to_le_bytes(), 0);
                }
                let n = out.len().min(8 - self.used);
                let (now, rest) = out.split_at_mut(n);
                now.copy_from_slice(&self.word[self.used..self.used + n]);
                self.used += n;
                out = rest;
            }
        }
    }
}

// ---------------------------------------------------------------- the protocol

/// The first bytes of a connection, by the connector.
#[derive(Clone, Copy)]
pub struct Hello {
    pub kind: u8,
    pub seed: u64,
    /// `u64::MAX`: until the sender ends.
    pub bytes: u64,
}

pub const ECHO: u8 = b'e';
pub const BOTH: u8 = b'b';
pub const ONE_WAY: u8 = b'o';
/// One way, and the stream just ends, without a trailer.
pub const UNENDED: u8 = b'u';

impl Hello {
    const LEN: usize = 20;

    pub fn encode(self) -> Vec<u8> {
        let mut out = vec![b's', b't', b'r', self.kind];
        out.extend(self.seed.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        out
    }

    pub fn read(from: &mut impl Read) -> Result<Self> {
        let mut image = [0; Self::LEN];
        from.read_exact(&mut image).map_err(|e| format!("hello: {e}"))?;
        let word = |at: usize| u64::from_le_bytes(*image[at..].first_chunk().unwrap_or(&[0; 8]));
        match &image {
            [b's', b't', b'r', kind, ..] => Ok(Self { kind: *kind, seed: word(4), bytes: word(12) }),
            _ => Err(format!("a first message that is none: {image:02x?}")),
        }
    }
}

/// How many bytes there were, and their SHA-256.
pub const TRAILER: usize = 8 + 32;

/// How far a call of `pump` came.
#[derive(PartialEq)]
pub enum Pumped {
    /// There is more to do.
    More,
    /// Everything is done.
    Done,
}

/// One direction out.
pub struct Sender {
    pub stream: Stream,
    pub sizes: Random,
    /// Bytes of a write.
    pub largest: u64,
    pub digest: Sha256,
    pub buffer: Vec<u8>,
    pub at: usize,
    /// Bytes of the stream made so far, those in the buffer included.
    pub made: u64,
    pub sent: u64,
    pub limit: u64,
    pub trailer: bool,
    pub trailed: bool,
    pub stop: Arc<AtomicBool>,
    pub report: Option<File>,
    pub pace: Option<(u64, Instant)>,
    /// With threads: sends nothing before the stream from the other end has ended.
    pub begins_at_eof: bool,
}

impl Sender {
    pub fn new(seed: u64, limit: u64, stop: Arc<AtomicBool>) -> Self {
        Self {
            stream: Stream::new(seed),
            sizes: Random(seed ^ 0x5eed),
            largest: LARGEST as u64,
            digest: Sha256::new(),
            buffer: Vec::with_capacity(LARGEST + TRAILER),
            at: 0,
            made: 0,
            sent: 0,
            limit,
            trailer: true,
            trailed: false,
            stop,
            report: None,
            pace: None,
            begins_at_eof: false,
        }
    }

    /// Makes the next piece, if one is wanted.
    pub fn refill(&mut self) -> Pumped {
        if self.at < self.buffer.len() {
            return Pumped::More;
        }
        self.at = 0;
        self.buffer.clear();
        let left = self.limit - self.made;
        if left == 0 || self.stop.load(Ordering::Relaxed) {
            if !self.trailer || self.trailed {
                return Pumped::Done;
            }
            self.trailed = true;
            self.buffer.extend(self.made.to_le_bytes());
            self.buffer.extend(self.digest.clone().finalize());
            return Pumped::More;
        }
        let size = (self.sizes.size() as u64).min(left).min(self.largest) as usize;
        self.buffer.resize(size, 0);
        self.stream.fill(&mut self.buffer);
        self.digest.update(&self.buffer);
        self.made += size as u64;
        Pumped::More
    }

    pub fn keep_pace(&self) {
        if let Some((rate, begun)) = self.pace {
            let due = Duration::from_secs_f64(self.sent as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }

    /// One write.
    pub fn pump(&mut self, to: &mut impl Write) -> io::Result<Pumped> {
        if self.refill() == Pumped::Done {
            return Ok(Pumped::Done);
        }
        self.keep_pace();
        let rest = &self.buffer[self.at..];
        // One in eight as a gathering write, of three pieces.
        let n = if self.sizes.below(8) == 0 && rest.len() > 2 {
            let (one, two) = rest.split_at(rest.len() / 3);
            let (two, three) = two.split_at(two.len() / 2);
            to.write_vectored(&[IoSlice::new(one), IoSlice::new(two), IoSlice::new(three)])?
        } else {
            to.write(rest)?
        };
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.at += n;
        self.sent += if self.trailed { 0 } else { n as u64 };
        if let Some(file) = &self.report {
            file.write_all_at(&self.sent.to_le_bytes(), 0)?;
        }
        Ok(Pumped::More)
    }
}

/// One direction in.
pub struct Receiver {
    pub expected: Stream,
    pub sizes: Random,
    pub digest: Sha256,
    pub buffer: Vec<u8>,
    pub own: Vec<u8>,
    /// Received, and not known to be of the stream: they may be the trailer.
    pub held: Vec<u8>,
    pub received: u64,
    pub limit: u64,
    pub trailer: bool,
}

impl Receiver {
    pub fn new(seed: u64, limit: u64, trailer: bool) -> Self {
        Self {
            expected: Stream::new(seed),
            sizes: Random(!seed),
            digest: Sha256::new(),
            buffer: vec![0; LARGEST],
            own: vec![0; LARGEST + TRAILER],
            held: Vec::with_capacity(LARGEST + TRAILER),
            received: 0,
            limit,
            trailer,
        }
    }

    /// One read.
    pub fn pump(&mut self, from: &mut impl Read) -> io::Result<Pumped> {
        let size = self.sizes.size();
        let n = if self.sizes.below(8) == 0 && size > 2 {
            let (one, two) = self.buffer[..size].split_at_mut(size / 3);
            from.read_vectored(&mut [IoSliceMut::new(one), IoSliceMut::new(two)])?
        } else {
            from.read(&mut self.buffer[..size])?
        };
        if n == 0 {
            return Ok(Pumped::Done);
        }
        self.held.extend_from_slice(&self.buffer[..n]);
        let keep = if self.trailer { TRAILER } else { 0 };
        if self.held.len() > keep {
            self.check(self.held.len() - keep)?;
        }
        Ok(Pumped::More)
    }

    /// The first `n` held bytes are of the stream.
    pub fn check(&mut self, n: usize) -> io::Result<()> {
        let (now, own) = (&self.held[..n], &mut self.own[..n]);
        self.expected.fill(own);
        if now != own {
            let at = now.iter().zip(&*own).position(|(a, b)| a != b).unwrap_or(0);
            let some = |bytes: &[u8]| format!("{:02x?}", &bytes[at..bytes.len().min(at + 24)]);
            let place = self.received + at as u64;
            let what = format!("byte {place} differs: got {} instead of {}", some(now), some(own));
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.digest.update(now);
        self.received += n as u64;
        self.held.drain(..n);
        Ok(())
    }

    /// The stream has ended: whether it is whole. Its digest.
    pub fn finish(self) -> Result<String> {
        let digest = self.digest.finalize();
        if self.trailer {
            if self.held.len() != TRAILER {
                return Err(format!("ended after {} bytes, without a trailer", self.received));
            }
            let (count, theirs) = self.held.split_at(8);
            if count != self.received.to_le_bytes() || theirs != digest.as_slice() {
                return Err(format!("{} bytes, but not those that the trailer tells of", self.received));
            }
            if self.limit != u64::MAX && self.received != self.limit {
                return Err(format!("{} bytes, want {}", self.received, self.limit));
            }
        }
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// What one direction came to, for the line at the end.
#[derive(Default)]
pub struct Report {
    pub sent: u64,
    pub received: u64,
    pub digest: String,
    pub error: Option<String>,
    pub end: &'static str,
}

impl Report {
    pub fn line(&self, peer: &str, kind: u8, begun: Instant) -> String {
        let error = self.error.as_ref().map_or("null".to_owned(), |e| format!("{e:?}"));
        format!(
            r#"{{"kind":"{}","peer":"{peer}","sent":{},"received":{},"sha256":"{}","end":"{}","seconds":{:.3},"error":{error}}}"#,
            kind as char,
            self.sent,
            self.received,
            self.digest,
            self.end,
            begun.elapsed().as_secs_f64()
        )
    }

    pub fn ended(&mut self, result: io::Result<()>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                self.end = match error.kind() {
                    io::ErrorKind::ConnectionReset => "reset",
                    io::ErrorKind::BrokenPipe => "pipe",
                    io::ErrorKind::InvalidData => "corrupt",
                    _ => "error",
                };
                self.error.get_or_insert(error.to_string());
                false
            }
        }
    }
}
