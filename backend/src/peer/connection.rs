//! One control connection: a socket, TLS on it, messages in it.

#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};

use mio::net::TcpStream;
use rustls::Connection as Session;
use rustls_pki_types::CertificateDer;

use super::message::{MessageError, PeerMessage};
use super::{Refusal, tls};

/// So much may wait to be sent: a peer that takes nothing for so long is not served any longer.
const MAX_WAITING: usize = 4 << 20;

/// So much is read before messages are looked at.
const MAX_BATCH: usize = 64 << 10;

/// What ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The other end closed, or died.
    Closed,
    /// The socket failed.
    Io(ErrorKind),
    /// TLS found the other end wanting.
    Tls(Refusal),
    /// Its messages are wrong.
    Message(MessageError),
    /// It takes nothing.
    Overrun,
}

/// See the module.
pub struct Connection {
    stream: TcpStream,
    session: Session,
    incoming: Vec<u8>,
    /// So much of `incoming` has been taken.
    taken: usize,
    outgoing: Vec<u8>,
    ended: Option<End>,
}

impl Connection {
    /// Speaks TLS on a socket.
    pub fn new(stream: TcpStream, session: Session) -> Self {
        Self { stream, session, incoming: Vec::new(), taken: 0, outgoing: Vec::new(), ended: None }
    }

    /// The socket, for readiness.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Whether both certificates have been checked.
    pub fn is_authenticated(&self) -> bool {
        !self.session.is_handshaking()
    }

    /// The other end's certificate.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.session.peer_certificates()?.first()
    }

    /// Queues a message.
    pub fn send(&mut self, message: &PeerMessage) {
        message.encode(&mut self.outgoing);
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn write(&mut self) -> Result<(), End> {
        loop {
            if !self.outgoing.is_empty() && !self.session.is_handshaking() {
                let taken = self.session.writer().write(&self.outgoing).map_err(io_end)?;
                self.outgoing.drain(..taken);
            }
            if !self.session.wants_write() {
                return Ok(());
            }
            match self.session.write_tls(&mut self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return if self.outgoing.len() > MAX_WAITING { Err(End::Overrun) } else { Ok(()) };
                }
                Err(error) => return Err(io_end(error)),
            }
        }
    }

    /// Reads what the socket has, or a good deal of it; true if there is more. How it ended is told by
    /// [`next`](Self::next), after the last message.
    pub fn read(&mut self) -> bool {
        self.incoming.drain(..std::mem::take(&mut self.taken));
        while self.ended.is_none() {
            if self.incoming.len() >= MAX_BATCH {
                return true;
            }
            match self.session.read_tls(&mut self.stream) {
                Ok(0) => self.ended = Some(End::Closed),
                Ok(_) => self.unwrap_records(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) => self.ended = Some(io_end(error)),
            }
        }
        false
    }

    fn unwrap_records(&mut self) {
        match self.session.process_new_packets() {
            Ok(state) => {
                let start = self.incoming.len();
                self.incoming.resize(start + state.plaintext_bytes_to_read(), 0);
                if self.session.reader().read_exact(&mut self.incoming[start..]).is_err() {
                    self.ended = Some(End::Tls(Refusal::Handshake));
                }
                if state.peer_has_closed() {
                    self.ended = Some(End::Closed);
                }
            }
            Err(error) => {
                self.ended = Some(End::Tls(tls::refusal(&error)));
                // Tells the other end why, if it still listens.
                let _ = self.session.write_tls(&mut self.stream);
            }
        }
    }

    /// The next whole message that has been read; the end after the last.
    pub fn next(&mut self) -> Result<Option<PeerMessage>, End> {
        match PeerMessage::decode(&self.incoming[self.taken..]) {
            Ok(Some((message, used))) => {
                self.taken += used;
                Ok(Some(message))
            }
            Ok(None) => self.ended.map_or(Ok(None), Err),
            Err(error) => Err(End::Message(error)),
        }
    }

    /// Says goodbye, if it can be said at once.
    pub fn close(&mut self) {
        self.session.send_close_notify();
        let _ = self.write();
    }
}

fn io_end(error: io::Error) -> End {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof => End::Closed,
        kind => End::Io(kind),
    }
}
