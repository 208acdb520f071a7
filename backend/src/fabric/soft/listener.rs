//! Strangers on the fabric's port, until they have shown what they are.
//!
//! A stranger may send one start-up frame of bounded size within a bounded time; nothing it does reaches a queue pair
//! before its secret has been found. Each secret serves once.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;

use super::mpa::{self, Binding, BindingError, Frame, FrameError, Kind};
use crate::fabric::{Refusal, Secret};

/// A stranger must have spoken by then. Our own peers need one round trip.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// This many strangers may be waiting; the one that has waited longest makes place for the next.
pub const MAX_STRANGERS: usize = 64;

/// So many spent secrets are remembered, to tell a replay from noise.
const REMEMBERED: usize = 1024;

/// A request frame in the making: reads exactly as much as belongs to it.
pub struct FrameReader {
    kind: Kind,
    bytes: [u8; mpa::FRAME_HEADER + mpa::MAX_PRIVATE],
    have: usize,
    want: usize,
}

/// Where a [`FrameReader`] stands.
pub enum Progress {
    /// More must come.
    Pending,
    /// The other end hung up.
    Eof,
    /// All there.
    Done(Frame),
}

impl FrameReader {
    /// Nothing read yet.
    pub fn new(kind: Kind) -> Self {
        let bytes = [0; mpa::FRAME_HEADER + mpa::MAX_PRIVATE];
        Self { kind, bytes, have: 0, want: mpa::FRAME_HEADER }
    }

    /// The private data of a frame that is done.
    pub fn private(&self) -> &[u8] {
        &self.bytes[mpa::FRAME_HEADER..self.want]
    }

    /// Reads on. The outer error is the socket's.
    pub fn read(&mut self, socket: &mut impl Read) -> io::Result<Result<Progress, FrameError>> {
        loop {
            while self.have < self.want {
                match socket.read(&mut self.bytes[self.have..self.want]) {
                    Ok(0) => return Ok(Ok(Progress::Eof)),
                    Ok(read) => self.have += read,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Ok(Progress::Pending));
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            let (header, _) = self.bytes.split_first_chunk().expect("the buffer holds a header");
            let frame = match Frame::parse(self.kind, header) {
                Ok(frame) => frame,
                Err(error) => return Ok(Err(error)),
            };
            if self.want == mpa::FRAME_HEADER + frame.private {
                return Ok(Ok(Progress::Done(frame)));
            }
            self.want = mpa::FRAME_HEADER + frame.private;
        }
    }
}

/// Someone who has connected and not yet been recognised.
pub struct Stranger<S> {
    /// The connection.
    pub stream: S,
    /// Where it comes from.
    pub from: SocketAddr,
    /// When it must have spoken.
    pub deadline: Instant,
    frame: FrameReader,
}

impl<S: Read> Stranger<S> {
    /// Someone new.
    pub fn new(stream: S, from: SocketAddr, now: Instant) -> Self {
        Self { stream, from, deadline: now + PATIENCE, frame: FrameReader::new(Kind::Request) }
    }

    /// Listens on: what the request says and whether it wants checksums, `None` if it is not whole.
    pub fn read(&mut self) -> Result<Option<(Binding, bool)>, Refusal> {
        let progress = self.frame.read(&mut self.stream).map_err(|_| Refusal::HungUp)?;
        match progress {
            Ok(Progress::Pending) => Ok(None),
            Ok(Progress::Eof) => Err(Refusal::HungUp),
            Ok(Progress::Done(frame)) => match Binding::parse(self.frame.private()) {
                Ok(binding) => Ok(Some((binding, frame.crc))),
                Err(BindingError::Length) => Err(Refusal::Malformed),
                Err(BindingError::Version) => Err(Refusal::WrongVersion),
            },
            Err(FrameError::Key) => Err(Refusal::BadMagic),
            Err(FrameError::Revision(_) | FrameError::Markers) => Err(Refusal::WrongVersion),
            Err(FrameError::Oversized(_)) => Err(Refusal::Oversized),
        }
    }
}

/// Which secrets are waiting for their dialler, and which have served.
#[derive(Default)]
pub struct Ledger {
    waiting: Vec<(Secret, u32, usize)>,
    spent: VecDeque<Secret>,
}

impl Ledger {
    /// Adds a secret for the queue pair at `index`; false if it is known already.
    #[must_use]
    pub fn expect(&mut self, secret: Secret, vni: u32, index: usize) -> bool {
        let known = self.waiting.iter().any(|(other, ..)| bool::from(other.ct_eq(&secret)));
        if known || self.is_spent(&secret) {
            return false;
        }
        self.waiting.push((secret, vni, index));
        true
    }

    /// Nobody is expected for `index` any more; its secret, if it had not served, never will.
    pub fn forget(&mut self, index: usize) {
        if let Some(at) = self.waiting.iter().position(|&(.., other)| other == index) {
            let (secret, ..) = self.waiting.swap_remove(at);
            self.spend(secret);
        }
    }

    /// Finds the queue pair of a request. The time it takes says nothing about which byte of a secret was wrong: every
    /// secret is compared whole.
    pub fn redeem(&mut self, binding: &Binding) -> Result<usize, Refusal> {
        let mut found = None;
        for (at, (secret, ..)) in self.waiting.iter().enumerate() {
            if bool::from(secret.ct_eq(&binding.secret)) {
                found = Some(at);
            }
        }
        let Some(at) = found else {
            let spent = self.is_spent(&binding.secret);
            return Err(if spent { Refusal::ReusedSecret } else { Refusal::UnknownSecret });
        };
        // Whoever knew the secret and got the rest wrong has used it up.
        let (secret, vni, index) = self.waiting.swap_remove(at);
        self.spend(secret);
        if vni == binding.vni { Ok(index) } else { Err(Refusal::WrongVni) }
    }

    fn is_spent(&self, secret: &Secret) -> bool {
        self.spent.iter().fold(false, |found, spent| found | bool::from(spent.ct_eq(secret)))
    }

    fn spend(&mut self, secret: Secret) {
        if self.spent.len() == REMEMBERED {
            self.spent.pop_front();
        }
        self.spent.push_back(secret);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_serves_once_and_for_its_vni() {
        let binding = |byte, vni| Binding { vni, secret: [byte; 32] };
        let mut ledger = Ledger::default();
        assert!(
            ledger.expect([1; 32], 100, 7) && ledger.expect([2; 32], 100, 8) && ledger.expect([3; 32], 1, 9)
        );
        assert!(!ledger.expect([1; 32], 100, 9));
        assert_eq!(ledger.redeem(&binding(9, 100)), Err(Refusal::UnknownSecret));
        assert_eq!(ledger.redeem(&binding(1, 100)), Ok(7));
        assert_eq!(ledger.redeem(&binding(1, 100)), Err(Refusal::ReusedSecret));
        assert_eq!(ledger.redeem(&binding(2, 200)), Err(Refusal::WrongVni));
        assert_eq!(ledger.redeem(&binding(2, 100)), Err(Refusal::ReusedSecret));
        ledger.forget(9);
        assert_eq!(ledger.redeem(&binding(3, 1)), Err(Refusal::ReusedSecret));
        assert!(!ledger.expect([3; 32], 1, 1));
    }

    fn stranger(bytes: &[u8]) -> Result<Option<(Binding, bool)>, Refusal> {
        let from = SocketAddr::from(([192, 0, 2, 9], 1));
        Stranger::new(bytes, from, Instant::now()).read()
    }

    #[test]
    fn requests_are_judged_by_name() {
        let binding = Binding { vni: 100, secret: [5; 32] };
        let mut good = Vec::new();
        Frame::emit(Kind::Request, true, &binding.emit(), &mut good);
        assert!(stranger(&good) == Ok(Some((binding, true))));
        assert!(stranger(&good[..30]) == Err(Refusal::HungUp));
        assert!(stranger(b"GET / HTTP/1.1\r\nHost: x\r\n") == Err(Refusal::BadMagic));
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            stranger(&bad)
        };
        assert!(with(17, 2) == Err(Refusal::WrongVersion));
        assert!(with(16, 0x80) == Err(Refusal::WrongVersion));
        assert!(with(18, 3) == Err(Refusal::Oversized));
        assert!(with(19, 37) == Err(Refusal::Malformed));
        assert!(with(21, 9) == Err(Refusal::WrongVersion));
    }
}
