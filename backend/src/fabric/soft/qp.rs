//! One queue pair on its socket: the start-up frames, then the two sides of the stream.

#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use super::ddp;
use super::listener::{FrameReader, Progress};
use super::mpa::{Binding, Frame, Kind};
use super::rx::{Rx, Step};
use super::tx::Tx;
use crate::fabric::registry::Registry;
use crate::fabric::{Disconnect, DomainId, Fault, QpId};

/// A TERMINATE has this long to reach the peer.
const FAREWELL: Duration = Duration::from_secs(1);

/// Reads in a row before another queue pair has its turn.
const FILLS: u32 = 8;

/// Where a queue pair stands in its life.
pub enum Phase {
    /// Its dialler has not come.
    Expected,
    /// TCP is connecting.
    Connecting(Binding),
    /// The request is out.
    AwaitReply(Box<FrameReader>),
    /// The reply is out; the dialler must speak first.
    AwaitReady,
    /// Connected.
    Open,
    /// Over for its owner; the peer is still being told why.
    Leaving,
}

/// See the module.
pub struct Qp {
    /// Its name.
    pub id: QpId,
    /// Whose memory it may touch.
    pub domain: DomainId,
    /// Where it stands.
    pub phase: Phase,
    /// When it must have got on.
    pub deadline: Option<Instant>,
    /// What is to be sent.
    pub tx: Tx,
    /// Posted to since the last flush.
    pub dirty: bool,
    /// In the list of those to be read.
    pub queued: bool,
    rx: Rx,
    stream: Option<TcpStream>,
    blocked: bool,
    readable: bool,
    closing: bool,
    fills: u32,
}

/// What reading brought.
pub enum Outcome {
    /// Nothing more to be had.
    Nothing,
    /// There is more, but others should have their turn.
    Yield,
    /// It is now connected.
    Connected,
    /// A message: this range of [`Qp::staging`].
    Message(Range<usize>),
    /// A message: [`Qp::assembled`].
    Assembled,
    /// It is over.
    Over(Disconnect),
    /// It is over by the peer's fault, who should be told; what to quote.
    Fault(Fault, u16, [u8; ddp::UNTAGGED_LEN], usize),
    /// The farewell is done.
    Left,
}

impl Qp {
    /// A queue pair without a connection.
    pub fn new(id: QpId, domain: DomainId, phase: Phase, deadline: Instant, crc: bool) -> Self {
        Self {
            id,
            domain,
            phase,
            deadline: Some(deadline),
            tx: Tx::new(crc),
            dirty: false,
            queued: false,
            rx: Rx::new(crc),
            stream: None,
            blocked: true,
            readable: false,
            closing: false,
            fills: 0,
        }
    }

    /// Takes the connection of a dialler whose request was good, and answers it.
    pub fn adopt(&mut self, stream: TcpStream, binding: &Binding, crc: bool) {
        let mut reply = Vec::new();
        Frame::emit(Kind::Reply, crc, &reply_private(binding), &mut reply);
        self.tx = Tx::new(crc);
        self.rx = Rx::new(crc);
        self.tx.push_frame(&reply);
        self.stream = Some(stream);
        self.phase = Phase::AwaitReady;
        self.blocked = false;
    }

    /// Takes a connection in the making.
    pub fn attach(&mut self, stream: TcpStream) {
        self.stream = Some(stream);
    }

    /// The connection, for (de)registration.
    pub fn stream(&mut self) -> Option<&mut TcpStream> {
        self.stream.as_mut()
    }

    /// Whether work may be posted.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// The bytes that [`Outcome::Message`] names.
    pub fn staging(&self) -> &[u8] {
        self.rx.staging()
    }

    /// The message that [`Outcome::Assembled`] speaks of.
    pub fn assembled(&self) -> &[u8] {
        self.rx.assembled()
    }

    /// The operating system says that there is something to read.
    pub fn set_readable(&mut self, closing: bool) {
        self.readable = true;
        self.closing |= closing;
    }

    /// The operating system says that there is room. An error is why dialling failed.
    pub fn set_writable(&mut self, crc: bool) -> Result<(), Disconnect> {
        self.blocked = false;
        let Phase::Connecting(binding) = &self.phase else { return Ok(()) };
        let Some(stream) = &self.stream else { return Ok(()) };
        if let Some(error) = stream.take_error().map_err(io_reason)? {
            return Err(io_reason(error));
        }
        if stream.peer_addr().is_err() {
            // Not connected yet; there will be another event.
            self.blocked = true;
            return Ok(());
        }
        stream.set_nodelay(true).map_err(io_reason)?;
        let mut request = Vec::new();
        Frame::emit(Kind::Request, crc, &binding.emit(), &mut request);
        self.tx.push_frame(&request);
        self.phase = Phase::AwaitReply(Box::new(FrameReader::new(Kind::Reply)));
        Ok(())
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn transmit(&mut self) -> Result<(), Disconnect> {
        let Some(stream) = &self.stream else { return Ok(()) };
        if self.blocked || self.tx.is_idle() {
            return Ok(());
        }
        match self.tx.transmit(stream.as_fd()) {
            Ok(idle) => self.blocked = !idle,
            Err(error) => {
                self.blocked = true;
                if !is_hangup(&error) {
                    return Err(io_reason(error));
                }
                // The peer may have said why before it hung up: the reader finds out.
                (self.readable, self.closing) = (true, true);
            }
        }
        if matches!(self.phase, Phase::Leaving) && self.tx.is_idle() {
            let _ = stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Whether a read would be worth it.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// Handles what was received and receives more.
    pub fn read(&mut self, registry: &Registry) -> Outcome {
        match &mut self.phase {
            Phase::Expected | Phase::Connecting(_) => {
                self.readable = false;
                Outcome::Nothing
            }
            Phase::AwaitReply(_) => self.read_reply(),
            Phase::Leaving => self.read_rest(),
            Phase::AwaitReady | Phase::Open => self.read_segments(registry),
        }
    }

    fn read_reply(&mut self) -> Outcome {
        let (Phase::AwaitReply(frame), Some(stream)) = (&mut self.phase, &mut self.stream) else {
            return Outcome::Nothing;
        };
        match frame.read(stream) {
            Ok(Ok(Progress::Pending)) => {
                self.readable = false;
                Outcome::Nothing
            }
            Ok(Ok(Progress::Eof)) => Outcome::Over(Disconnect::Rejected),
            Ok(Ok(Progress::Done(reply))) if reply.reject || frame.private().len() != REPLY_LEN => {
                Outcome::Over(Disconnect::Rejected)
            }
            Ok(Ok(Progress::Done(reply))) => {
                self.tx = Tx::new(reply.crc);
                self.rx = Rx::new(reply.crc);
                self.tx.push_ready();
                self.open()
            }
            Ok(Err(_)) => Outcome::Over(Disconnect::Malformed("the reply is no MPA reply")),
            Err(error) if is_hangup(&error) => Outcome::Over(Disconnect::Rejected),
            Err(error) => Outcome::Over(io_reason(error)),
        }
    }

    fn open(&mut self) -> Outcome {
        self.phase = Phase::Open;
        self.deadline = None;
        Outcome::Connected
    }

    fn read_segments(&mut self, registry: &Registry) -> Outcome {
        let Some(stream) = &mut self.stream else { return Outcome::Nothing };
        loop {
            match self.rx.next(registry, self.domain) {
                Step::Placed if matches!(self.phase, Phase::AwaitReady) => return self.open(),
                Step::Placed => continue,
                Step::Message(_) | Step::Assembled if matches!(self.phase, Phase::AwaitReady) => {
                    return Outcome::Over(Disconnect::Malformed("a message before the dialler was ready"));
                }
                Step::Message(range) => return Outcome::Message(range),
                Step::Assembled => return Outcome::Assembled,
                Step::Terminated(fault) => return Outcome::Over(Disconnect::Terminated(fault)),
                Step::Fault(fault, len, quote, quoted) => return Outcome::Fault(fault, len, quote, quoted),
                Step::Malformed(what) => return Outcome::Over(Disconnect::Malformed(what)),
                Step::NeedBytes => {}
            }
            if !self.readable {
                return Outcome::Nothing;
            }
            self.fills += 1;
            if self.fills > FILLS {
                self.fills = 0;
                return Outcome::Yield;
            }
            match self.rx.fill(stream, registry, self.domain) {
                Err(fault) => return Outcome::Fault(fault, 0, [0; ddp::UNTAGGED_LEN], 0),
                Ok(Ok((0, _))) => return Outcome::Over(Disconnect::PeerClosed),
                // A short read has emptied the socket, unless its end is still to be read.
                Ok(Ok((read, asked))) => self.readable = read == asked || self.closing,
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) if is_hangup(&error) => return Outcome::Over(Disconnect::PeerClosed),
                Ok(Err(error)) => return Outcome::Over(io_reason(error)),
            }
        }
    }

    /// Reads and drops, so that closing does not reset the connection before the farewell is read.
    fn read_rest(&mut self) -> Outcome {
        let Some(stream) = &mut self.stream else { return Outcome::Left };
        let mut scrap = [0; 16 << 10];
        loop {
            match stream.read(&mut scrap) {
                Ok(0) => return Outcome::Left,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Outcome::Nothing;
                }
                Err(_) => return Outcome::Left,
            }
        }
    }

    /// Begins the farewell: tells the peer what it did wrong. [`Tx::abandon`] has been called.
    pub fn leave(&mut self, fault: Fault, segment_len: u16, quote: &[u8], now: Instant) {
        self.tx.push_terminate(fault, segment_len, quote);
        self.phase = Phase::Leaving;
        self.deadline = Some(now + FAREWELL);
        // A failure here is the end of a farewell that the deadline ends anyway.
        let _ = self.transmit();
    }
}

const REPLY_LEN: usize = 6;

/// Version and VNI, back to the dialler.
fn reply_private(binding: &Binding) -> [u8; REPLY_LEN] {
    let whole = binding.emit();
    let mut out = [0; REPLY_LEN];
    out.copy_from_slice(&whole[..REPLY_LEN]);
    out
}

fn is_hangup(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn io_reason(error: io::Error) -> Disconnect {
    Disconnect::Io(error.kind())
}
