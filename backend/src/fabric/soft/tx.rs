//! The transmit side of a queue pair: from work requests to a stream, many of them per system call.
//!
//! Headers and SENDs are laid down one after another in one buffer (the *arena*); the payload of a WRITE stays in its
//! region until the kernel takes it. What is to be sent is therefore a list of pieces, alternately the next so many
//! bytes of the arena and a range of a region, which a gathering send turns into one system call.
//!
//! ```text
//! arena    … | FPDU | FPDU | header |          | trailer | FPDU | …
//! region                             ╰ payload ╯
//! ```
//!
//! With checksums on, a WRITE's payload is copied into the arena too: others may change the region between the moment
//! it is summed and the moment it is sent.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::ddp::{self, Header};
use super::mpa;
use super::rdmap::{self, Opcode, Terminate};
use crate::fabric::memory::{self, Pieces};
use crate::fabric::{
    Fault, LocalRange, MAX_GATHER, MAX_SEND, MAX_WRITE, PostError, Region, RemoteAddress, Signal, WorkId,
};

/// Segments not yet taken by the kernel: past this the queue is full. Enough for a batch of every flow, and a few
/// hundred µs of line rate.
const MAX_QUEUED: usize = 8192;

/// Bytes of arena not yet taken by the kernel: past this the queue is full.
const MAX_ARENA: usize = 1 << 20;

/// The payload of one WRITE segment is at most this: a 64 KiB write makes two even halves, not a whole and a crumb.
const MAX_SEGMENT: usize = 61440;

enum Piece {
    Arena { len: usize },
    Region { region: Region, offset: usize, len: usize },
}

/// One FPDU in the stream; the last one of a message carries the work request.
struct Segment {
    end: u64,
    work: Option<(WorkId, Signal)>,
}

/// See the module.
pub struct Tx {
    crc: bool,
    arena: Vec<u8>,
    head: usize,
    pieces: VecDeque<Piece>,
    segments: VecDeque<Segment>,
    queued: u64,
    sent: u64,
    /// Where the first of `segments` begins.
    begun: u64,
    msn: u32,
    refused: bool,
}

impl Tx {
    /// An empty queue.
    pub fn new(crc: bool) -> Self {
        Self {
            crc,
            arena: Vec::new(),
            head: 0,
            pieces: VecDeque::new(),
            segments: VecDeque::new(),
            queued: 0,
            sent: 0,
            begun: 0,
            msn: 1,
            refused: false,
        }
    }

    /// Whether everything has been taken by the kernel.
    pub fn is_idle(&self) -> bool {
        self.sent == self.queued
    }

    /// Bytes that are not FPDUs: the start-up frame.
    pub fn push_frame(&mut self, bytes: &[u8]) {
        self.arena.extend_from_slice(bytes);
        self.queue_arena(bytes.len());
        self.segments.push_back(Segment { end: self.queued, work: None });
    }

    /// The zero-length WRITE by which the dialler, who must speak first, says that it is ready.
    pub fn push_ready(&mut self) {
        let header = Header::Tagged { last: true, ulp: Opcode::Write.control(), tag: 0, offset: 0 };
        self.push_fpdu(header, &[], None);
    }

    fn check_room(&mut self, segments: usize, bytes: usize) -> Result<(), PostError> {
        let waiting = self.arena.len() - self.head;
        let fits = self.segments.len() + segments <= MAX_QUEUED && waiting + bytes <= MAX_ARENA;
        // A request that is larger than all room goes into an empty queue.
        if fits || self.segments.is_empty() {
            return Ok(());
        }
        self.refused = true;
        Err(PostError::Full)
    }

    /// Whether a refused poster should hear that there is room; says so once.
    pub fn take_room(&mut self) -> bool {
        let room = self.segments.len() <= MAX_QUEUED / 2 && self.arena.len() - self.head <= MAX_ARENA / 2;
        room && std::mem::take(&mut self.refused)
    }

    /// Queues a SEND.
    pub fn post_send(&mut self, work: WorkId, gather: &[&[u8]], signal: Signal) -> Result<(), PostError> {
        let len: usize = gather.iter().map(|piece| piece.len()).sum();
        if gather.len() > MAX_GATHER || len > MAX_SEND {
            return Err(PostError::TooLong);
        }
        self.check_room(1, mpa::fpdu(ddp::UNTAGGED_LEN + len))?;
        let msn = self.msn;
        self.msn = msn.wrapping_add(1);
        let ulp = Opcode::Send.control();
        let header = Header::Untagged { last: true, ulp, queue: rdmap::SEND_QUEUE, msn, offset: 0 };
        self.push_fpdu(header, gather, Some((work, signal)));
        Ok(())
    }

    fn push_fpdu(&mut self, header: Header, gather: &[&[u8]], work: Option<(WorkId, Signal)>) {
        let start = self.arena.len();
        self.arena.extend_from_slice(&[0; mpa::LENGTH_LEN]);
        header.emit(&mut self.arena);
        for piece in gather {
            self.arena.extend_from_slice(piece);
        }
        self.finish_length(start, 0);
        mpa::close(&mut self.arena, start, self.crc);
        self.queue_arena(self.arena.len() - start);
        self.segments.push_back(Segment { end: self.queued, work });
    }

    /// Fills in the length of the ULPDU that began at `start`, `elsewhere` bytes of which are not in the arena.
    fn finish_length(&mut self, start: usize, elsewhere: usize) -> usize {
        let ulpdu = self.arena.len() - start - mpa::LENGTH_LEN + elsewhere;
        debug_assert!(ulpdu <= mpa::MAX_ULPDU);
        self.arena[start..start + mpa::LENGTH_LEN].copy_from_slice(&(ulpdu as u16).to_be_bytes());
        ulpdu
    }

    /// Queues a WRITE from `region`, which holds `local`.
    pub fn post_write(
        &mut self,
        work: WorkId,
        region: &Region,
        local: LocalRange,
        remote: RemoteAddress,
        signal: Signal,
    ) -> Result<(), PostError> {
        if local.len > MAX_WRITE {
            return Err(PostError::TooLong);
        }
        let count = local.len.div_ceil(MAX_SEGMENT).max(1);
        // Even segments, in whole cache lines.
        let each = local.len.div_ceil(count).next_multiple_of(64).min(MAX_SEGMENT);
        let overhead = mpa::fpdu(ddp::TAGGED_LEN) + 4;
        self.check_room(count, count * overhead + if self.crc { local.len } else { 0 })?;
        let mut done = 0;
        for _ in 0..count {
            let len = each.min(local.len - done);
            let last = done + len == local.len;
            // A wrapping sum is the peer's to refuse.
            let offset = remote.address.wrapping_add(done as u64);
            let header = Header::Tagged { last, ulp: Opcode::Write.control(), tag: remote.rkey, offset };
            let work = last.then_some((work, signal));
            if self.crc {
                self.push_summed(header, region, local.offset + done, len, work);
            } else {
                self.push_segment(header, region, local.offset + done, len, work);
            }
            done += len;
        }
        Ok(())
    }

    fn push_segment(
        &mut self,
        header: Header,
        region: &Region,
        offset: usize,
        len: usize,
        work: Option<(WorkId, Signal)>,
    ) {
        let start = self.arena.len();
        self.arena.extend_from_slice(&[0; mpa::LENGTH_LEN]);
        header.emit(&mut self.arena);
        let ulpdu = self.finish_length(start, len);
        self.queue_arena(self.arena.len() - start);
        if len > 0 {
            self.pieces.push_back(Piece::Region { region: region.clone(), offset, len });
            self.queued += len as u64;
        }
        let start = self.arena.len();
        mpa::close_open_ended(&mut self.arena, ulpdu);
        self.queue_arena(self.arena.len() - start);
        self.segments.push_back(Segment { end: self.queued, work });
    }

    fn push_summed(
        &mut self,
        header: Header,
        region: &Region,
        offset: usize,
        len: usize,
        work: Option<(WorkId, Signal)>,
    ) {
        let start = self.arena.len();
        self.arena.extend_from_slice(&[0; mpa::LENGTH_LEN]);
        header.emit(&mut self.arena);
        self.copy_region(region, offset, len);
        self.finish_length(start, 0);
        mpa::close(&mut self.arena, start, true);
        self.queue_arena(self.arena.len() - start);
        self.segments.push_back(Segment { end: self.queued, work });
    }

    fn copy_region(&mut self, region: &Region, offset: usize, len: usize) {
        let at = self.arena.len();
        self.arena.resize(at + len, 0);
        let copied = region.copy_out(offset, &mut self.arena[at..]);
        debug_assert!(copied, "the range was checked when it was posted");
    }

    fn queue_arena(&mut self, len: usize) {
        self.queued += len as u64;
        match self.pieces.back_mut() {
            Some(Piece::Arena { len: more }) => *more += len,
            _ => self.pieces.push_back(Piece::Arena { len }),
        }
    }

    /// Sends until the socket takes no more (false) or nothing is left (true).
    pub fn transmit(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while !self.is_idle() {
            let sent = memory::send(socket, &self.gather());
            match sent {
                Ok(sent) => self.advance(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn gather(&self) -> Pieces<'_> {
        let mut gathered = Pieces::new();
        let mut at = self.head;
        for piece in &self.pieces {
            let taken = match piece {
                Piece::Arena { len } => {
                    at += len;
                    gathered.push(&self.arena[at - len..at])
                }
                Piece::Region { region, offset, len } => gathered.push_region(region, *offset, *len),
            };
            if !taken {
                break;
            }
        }
        gathered
    }

    fn advance(&mut self, mut sent: usize) {
        self.sent += sent as u64;
        while sent > 0 {
            let Some(piece) = self.pieces.front_mut() else { break };
            let (len, in_arena) = match piece {
                Piece::Arena { len } => (len, true),
                Piece::Region { offset, len, .. } => {
                    *offset += sent.min(*len);
                    (len, false)
                }
            };
            let taken = sent.min(*len);
            *len -= taken;
            sent -= taken;
            if *len == 0 {
                self.pieces.pop_front();
            }
            if in_arena {
                self.head += taken;
            }
        }
        if self.head == self.arena.len() {
            self.arena.clear();
            self.head = 0;
        } else if self.head >= MAX_ARENA / 4 && self.head >= self.arena.len() / 2 {
            self.arena.drain(..self.head);
            self.head = 0;
        }
    }

    /// The next work request that the kernel has taken whole.
    pub fn poll_done(&mut self) -> Option<(WorkId, Signal)> {
        while self.segments.front().is_some_and(|segment| segment.end <= self.sent) {
            let Some(segment) = self.segments.pop_front() else { break };
            self.begun = segment.end;
            if segment.work.is_some() {
                return segment.work;
            }
        }
        None
    }

    /// Gives up all that has not begun to leave: no region is read any more. The FPDU that is half out is completed from
    /// a private copy, so that the stream stays readable to its end. Gives back the work requests that will not complete.
    pub fn abandon(&mut self) -> Vec<WorkId> {
        debug_assert!(self.segments.front().is_none_or(|segment| segment.end > self.sent), "poll_done first");
        let works = self.segments.iter().filter_map(|segment| Some(segment.work?.0)).collect();
        let half_out = self.segments.front().filter(|_| self.begun < self.sent);
        let keep = half_out.map_or(0, |segment| segment.end - self.sent);
        let rest = self.copy_next(keep as usize);
        self.pieces.clear();
        self.segments.clear();
        self.arena = rest;
        self.head = 0;
        self.queued = self.sent;
        self.begun = self.sent;
        if !self.arena.is_empty() {
            self.queue_arena(self.arena.len());
            self.segments.push_back(Segment { end: self.queued, work: None });
        }
        works
    }

    fn copy_next(&self, mut len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        let mut at = self.head;
        for piece in &self.pieces {
            match piece {
                Piece::Arena { len: have } => {
                    let take = len.min(*have);
                    out.extend_from_slice(&self.arena[at..at + take]);
                    at += have;
                    len -= take;
                }
                Piece::Region { region, offset, len: have } => {
                    let take = len.min(*have);
                    let start = out.len();
                    out.resize(start + take, 0);
                    let copied = region.copy_out(*offset, &mut out[start..]);
                    debug_assert!(copied, "the range was checked when it was posted");
                    len -= take;
                }
            }
            if len == 0 {
                break;
            }
        }
        out
    }

    /// Ends the stream with a TERMINATE. Call [`abandon`](Self::abandon) first.
    pub fn push_terminate(&mut self, fault: Fault, segment_len: u16, header: &[u8]) {
        let mut body = Vec::new();
        Terminate::emit(fault, segment_len, header, &mut body);
        let ulp = Opcode::Terminate.control();
        let header = Header::Untagged { last: true, ulp, queue: rdmap::TERMINATE_QUEUE, msn: 1, offset: 0 };
        self.push_fpdu(header, &[&body], None);
    }
}
