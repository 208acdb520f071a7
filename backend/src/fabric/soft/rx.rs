//! The receive side of a queue pair: from a stream to placed bytes and messages.
//!
//! Small segments are read many at a time into a staging buffer and handled there. Of a large tagged segment only what
//! came with its header goes through staging; the rest is read by the kernel straight into the destination region, in
//! the same system call that fetches the beginning of what follows. How much is read ahead depends on what the peer
//! has been sending: batches of small messages fill the staging buffer, bulk never does.
//!
//! With checksums on a segment is placed only when it is whole and right, so everything goes through staging.

#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;

use super::ddp::{self, Header};
use super::mpa;
use super::rdmap::{self, Opcode, Terminate};
use crate::fabric::memory;
use crate::fabric::registry::Registry;
use crate::fabric::{DomainId, Fault, MAX_SEND};

/// Holds any FPDU, and some hundred small ones.
const STAGING: usize = 128 << 10;

/// Read ahead in bulk: the trailer, a SEND with a segment's headers, the next header. More would be copied twice.
const BULK_AHEAD: usize = 1024;

/// Segments of this average size are bulk.
const BULK: usize = 4096;

/// Payload not worth a system call of its own.
const DIRECT_MIN: usize = 2048;

/// A tagged segment whose payload goes on past what staging held.
#[derive(Debug, Clone, Copy)]
struct Direct {
    tag: u32,
    address: u64,
    left: usize,
    trailer: usize,
}

enum State {
    /// At a boundary between FPDUs.
    Boundary,
    /// Inside a tagged segment's payload.
    Payload(Direct),
    /// These many bytes of padding and CRC, then a boundary.
    Trailer(usize),
}

/// What [`Rx::next`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing whole: [`Rx::fill`] first.
    NeedBytes,
    /// A message: these bytes of [`Rx::staging`].
    Message(Range<usize>),
    /// A message that came in pieces: [`Rx::assembled`].
    Assembled,
    /// A WRITE's segment has been placed.
    Placed,
    /// The peer says that we have done wrong.
    Terminated(Fault),
    /// The peer has done wrong: the length of its segment, and as much of the header as is known.
    Fault(Fault, u16, [u8; ddp::UNTAGGED_LEN], usize),
    /// This is no MPA.
    Malformed(&'static str),
}

/// See the module.
pub struct Rx {
    crc: bool,
    staging: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    average: usize,
    msn: u32,
    assembly: Vec<u8>,
    delivered: bool,
}

impl Rx {
    /// At the beginning of the stream of FPDUs.
    pub fn new(crc: bool) -> Self {
        Self {
            crc,
            staging: vec![0; STAGING].into_boxed_slice(),
            start: 0,
            end: 0,
            state: State::Boundary,
            average: 0,
            msn: 1,
            assembly: Vec::new(),
            delivered: false,
        }
    }

    /// The bytes that [`Step::Message`] names.
    pub fn staging(&self) -> &[u8] {
        &self.staging
    }

    /// The message that [`Step::Assembled`] speaks of.
    pub fn assembled(&self) -> &[u8] {
        &self.assembly
    }

    /// Whether the stream may end here without loss.
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Boundary) && self.start == self.end
    }

    /// Reads once. The first number is what was read, the second what was asked for: less means that there is no more.
    pub fn fill<S: AsFd + Read>(
        &mut self,
        socket: &mut S,
        registry: &Registry,
        domain: DomainId,
    ) -> Result<io::Result<(usize, usize)>, Fault> {
        if let State::Payload(direct) = &mut self.state
            && direct.left >= DIRECT_MIN
        {
            debug_assert_eq!(self.start, self.end, "payload in staging is placed first");
            // Looked up again each time: the region may have been taken back since.
            let (region, offset) = registry.remote(domain, direct.tag, direct.address, direct.left)?;
            let ahead = &mut self.staging[..BULK_AHEAD];
            let asked = direct.left + ahead.len();
            let read = memory::receive(socket.as_fd(), region, offset, direct.left, ahead);
            return Ok(read.map(|read| {
                let placed = read.min(direct.left);
                direct.left -= placed;
                direct.address += placed as u64;
                (self.start, self.end) = (0, read - placed);
                (read, asked)
            }));
        }
        self.make_room();
        let ahead = if self.average >= BULK && !self.crc { BULK_AHEAD } else { STAGING };
        let want = self.wanted().max(ahead).min(STAGING - self.end);
        let read = socket.read(&mut self.staging[self.end..self.end + want]);
        Ok(read.map(|read| {
            self.end += read;
            (read, want)
        }))
    }

    /// The bytes that must come at least, so that a message larger than the read-ahead gets whole in few calls.
    fn wanted(&self) -> usize {
        let have = &self.staging[self.start..self.end];
        match (&self.state, have) {
            (State::Boundary, [high, low, ..]) => {
                let whole = mpa::fpdu(usize::from(u16::from_be_bytes([*high, *low])));
                let tagged = have.get(2).is_some_and(|&first| ddp::header_len(first) == ddp::TAGGED_LEN);
                if tagged && !self.crc { 0 } else { whole.saturating_sub(have.len()) }
            }
            (State::Payload(direct), _) => direct.left + BULK_AHEAD,
            _ => 0,
        }
    }

    /// Moves what is left to the front, when it is in the way.
    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 && STAGING - self.start < mpa::MAX_FPDU + BULK_AHEAD {
            self.staging.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Handles the next segment that staging holds.
    pub fn next(&mut self, registry: &Registry, domain: DomainId) -> Step {
        if std::mem::take(&mut self.delivered) {
            self.assembly.clear();
        }
        loop {
            match self.state {
                State::Boundary => match self.segment(registry, domain) {
                    // The whole segment, or the part of it that is here.
                    Ok(Some(step)) => return step,
                    Ok(None) => return Step::NeedBytes,
                    Err(step) => return step,
                },
                State::Payload(direct) => match self.payload(direct, registry, domain) {
                    Ok(true) => {}
                    Ok(false) => return Step::NeedBytes,
                    Err(fault) => return self.fault(fault),
                },
                State::Trailer(left) => {
                    let taken = left.min(self.end - self.start);
                    self.start += taken;
                    if taken < left {
                        self.state = State::Trailer(left - taken);
                        return Step::NeedBytes;
                    }
                    self.state = State::Boundary;
                    return Step::Placed;
                }
            }
        }
    }

    /// Places what staging has of a payload; true when that was the end of it.
    fn payload(&mut self, direct: Direct, registry: &Registry, domain: DomainId) -> Result<bool, Fault> {
        let here = direct.left.min(self.end - self.start);
        if here > 0 {
            let (region, offset) = registry.remote(domain, direct.tag, direct.address, direct.left)?;
            if !region.copy_in(offset, &self.staging[self.start..self.start + here]) {
                return Err(Fault::Bounds);
            }
            self.start += here;
        }
        let left = direct.left - here;
        self.state = match left {
            0 => State::Trailer(direct.trailer),
            _ => State::Payload(Direct { address: direct.address + here as u64, left, ..direct }),
        };
        Ok(left == 0)
    }

    fn fault(&self, fault: Fault) -> Step {
        Step::Fault(fault, 0, [0; ddp::UNTAGGED_LEN], 0)
    }

    /// At a boundary: `None` if the segment's header, or the whole of one that must be whole, is not here yet.
    fn segment(&mut self, registry: &Registry, domain: DomainId) -> Result<Option<Step>, Step> {
        let have = &self.staging[self.start..self.end];
        let &[high, low, first, ..] = have else { return Ok(None) };
        let ulpdu = usize::from(u16::from_be_bytes([high, low]));
        let header_len = ddp::header_len(first);
        if ulpdu < header_len {
            return Err(Step::Malformed("a ULPDU shorter than its header"));
        }
        let Some(quoted) = have.get(mpa::LENGTH_LEN..mpa::LENGTH_LEN + header_len) else { return Ok(None) };
        let mut quote = [0; ddp::UNTAGGED_LEN];
        quote[..header_len].copy_from_slice(quoted);
        let fault = move |fault| Step::Fault(fault, ulpdu as u16, quote, header_len);
        let header = Header::parse(quoted).map_err(|error| match error {
            ddp::Error::Version { tagged: true } => fault(rdmap::BAD_TAGGED_VERSION),
            ddp::Error::Version { tagged: false } => fault(rdmap::BAD_UNTAGGED_VERSION),
            ddp::Error::Short => Step::Malformed("a segment shorter than its header"),
        })?;
        let (Header::Tagged { ulp, .. } | Header::Untagged { ulp, .. }) = header;
        let opcode = Opcode::parse(ulp).map_err(|error| match error {
            rdmap::Error::Version => fault(rdmap::BAD_VERSION),
            rdmap::Error::Opcode => fault(rdmap::BAD_OPCODE),
        })?;
        let whole = mpa::fpdu(ulpdu);
        let is_write = matches!(header, Header::Tagged { .. });
        if is_write && opcode != Opcode::Write || !is_write && opcode == Opcode::Write {
            return Err(fault(rdmap::BAD_OPCODE));
        }
        if !is_write && ulpdu - header_len > MAX_SEND {
            return Err(fault(rdmap::TOO_LONG));
        }
        let is_whole = have.len() >= whole;
        if (self.crc || !is_write) && !is_whole {
            return Ok(None);
        }
        if self.crc && !mpa::crc_matches(&have[..whole]) {
            return Err(fault(rdmap::BAD_CRC));
        }
        let payload = self.start + mpa::LENGTH_LEN + header_len;
        let len = ulpdu - header_len;
        match header {
            Header::Tagged { tag, offset, .. } => {
                // A write of nothing names nothing.
                if len > 0 {
                    registry.remote(domain, tag, offset, len).map_err(fault)?;
                }
                self.average += len / 8;
                self.average -= self.average / 8;
                self.start = payload;
                let trailer = mpa::trailer(ulpdu);
                self.state = State::Payload(Direct { tag, address: offset, left: len, trailer });
                Ok(Some(self.next(registry, domain)))
            }
            Header::Untagged { last, queue, msn, offset, .. } => {
                self.average -= self.average.div_ceil(8);
                let body = payload..payload + len;
                let step = self.untagged(opcode, last, queue, msn, offset, body).map_err(fault);
                self.start += whole;
                step
            }
        }
    }

    fn untagged(
        &mut self,
        opcode: Opcode,
        last: bool,
        queue: u32,
        msn: u32,
        offset: u32,
        body: Range<usize>,
    ) -> Result<Option<Step>, Fault> {
        match (queue, opcode) {
            (rdmap::SEND_QUEUE, Opcode::Send) => {}
            (rdmap::TERMINATE_QUEUE, Opcode::Terminate) => {
                let fault = Terminate::parse(&self.staging[body]);
                return Ok(Some(match fault {
                    Some(fault) => Step::Terminated(fault),
                    None => Step::Malformed("a TERMINATE that does not say why"),
                }));
            }
            (rdmap::SEND_QUEUE | rdmap::TERMINATE_QUEUE, _) => return Err(rdmap::BAD_OPCODE),
            _ => return Err(rdmap::BAD_QUEUE),
        }
        if msn != self.msn {
            return Err(rdmap::BAD_MSN);
        }
        if offset as usize != self.assembly.len() {
            return Err(rdmap::BAD_OFFSET);
        }
        if last {
            self.msn = msn.wrapping_add(1);
            if self.assembly.is_empty() {
                return Ok(Some(Step::Message(body)));
            }
        }
        if self.assembly.len() + body.len() > MAX_SEND {
            return Err(rdmap::TOO_LONG);
        }
        self.assembly.extend_from_slice(&self.staging[body]);
        self.delivered = last;
        Ok(Some(if last { Step::Assembled } else { Step::Placed }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::fabric::soft::tx::Tx;
    use crate::fabric::{Access, LocalRange, MemoryKey, Region, RemoteAddress, Signal, WorkId};

    const DOMAIN: DomainId = DomainId(1);

    /// A stream of all that is spoken, as bytes.
    fn stream(crc: bool, key: MemoryKey) -> Vec<u8> {
        let (a, mut b) = UnixStream::pair().unwrap();
        let mut tx = Tx::new(crc);
        let source = Region::private(9000);
        for n in 0..4_u64 {
            let len = [0, 100, 3000, 9000][n as usize];
            let local = LocalRange { lkey: 0, offset: 0, len };
            let remote = RemoteAddress { rkey: key.rkey, address: key.base + n };
            tx.post_write(WorkId(n), &source, local, remote, Signal::No).unwrap();
            tx.post_send(WorkId(n), &[&[n as u8; 77]], Signal::No).unwrap();
        }
        tx.transmit(a.as_fd()).unwrap();
        drop(a);
        let mut bytes = Vec::new();
        b.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// How many messages come out, until the end or an error.
    fn messages(crc: bool, registry: &Registry, bytes: &[u8], chunk: usize) -> (usize, Option<Step>) {
        let (mut a, b) = UnixStream::pair().unwrap();
        let mut b = Some(b);
        let mut chunks = bytes.chunks(chunk);
        let (mut rx, mut count) = (Rx::new(crc), 0);
        loop {
            match rx.next(registry, DOMAIN) {
                Step::NeedBytes => {}
                Step::Placed => continue,
                Step::Message(_) | Step::Assembled => {
                    count += 1;
                    continue;
                }
                other => return (count, Some(other)),
            }
            match (chunks.next(), &mut b) {
                (Some(chunk), Some(b)) => b.write_all(chunk).unwrap(),
                _ => b = None,
            }
            match rx.fill(&mut a, registry, DOMAIN) {
                Ok(Ok((0, _))) => return (count, None),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => panic!("{error}"),
                Err(fault) => return (count, Some(rx.fault(fault))),
            }
        }
    }

    fn registry() -> (Registry, MemoryKey) {
        let mut registry = Registry::default();
        let key = registry.register(DOMAIN, Region::private(10_000), Access::RemoteWrite).unwrap();
        (registry, key)
    }

    #[test]
    fn it_does_not_matter_where_the_stream_is_cut() {
        let (registry, key) = registry();
        for crc in [false, true] {
            let bytes = stream(crc, key);
            for chunk in [1, 2, 3, 7, 64, 1000, 2049, 100_000] {
                assert_eq!(
                    messages(crc, &registry, &bytes, chunk),
                    (4, None),
                    "crc {crc}, chunks of {chunk}"
                );
            }
        }
    }

    #[test]
    fn no_flipped_bit_panics_and_crc_finds_each() {
        let (registry, key) = registry();
        for crc in [false, true] {
            let good = stream(crc, key);
            for at in (0..200).chain((200..good.len()).step_by(61)) {
                let mut bad = good.clone();
                bad[at] ^= 1 << (at % 8);
                let (count, end) = messages(crc, &registry, &bad, 5000);
                // A longer length may also wait for bytes that do not come.
                assert!(!crc || end.is_some() || count < 4, "bit at {at}");
            }
        }
    }

    #[test]
    fn messages_may_come_in_segments() {
        let (registry, _) = registry();
        let segment = |last, msn, offset, body: &[u8]| {
            let mut out = vec![0, (ddp::UNTAGGED_LEN + body.len()) as u8];
            let ulp = Opcode::Send.control();
            Header::Untagged { last, ulp, queue: 0, msn, offset }.emit(&mut out);
            out.extend(body);
            mpa::close(&mut out, 0, false);
            out
        };
        let good =
            [segment(false, 1, 0, b"abc"), segment(true, 1, 3, b"def"), segment(true, 2, 0, b"g")].concat();
        assert_eq!(messages(false, &registry, &good, 9), (2, None));
        let reason = |bytes: &[u8]| match messages(false, &registry, bytes, 9).1 {
            Some(Step::Fault(fault, ..)) => fault,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(&segment(true, 2, 0, b"x")), rdmap::BAD_MSN);
        assert_eq!(reason(&segment(true, 1, 1, b"x")), rdmap::BAD_OFFSET);
        let mut other = segment(true, 1, 0, b"x");
        other[11] = 1;
        assert_eq!(reason(&other), rdmap::BAD_QUEUE);
        other[3] = Opcode::Write.control();
        assert_eq!(reason(&other), rdmap::BAD_OPCODE);
        assert_eq!(
            messages(false, &registry, &[0, 3, 0, 0], 9).1,
            Some(Step::Malformed("a ULPDU shorter than its header"))
        );
    }
}
