//! The listening socket: who knocks becomes a stranger, and a stranger with the right secret a queue pair.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use mio::net::TcpStream;
use mio::{Interest, Token};

use super::listener::{MAX_STRANGERS, Stranger};
use super::mpa::Binding;
use super::{Happened, STRANGERS, Soft};
use crate::fabric::{Disconnect, Refusal};

impl Soft {
    /// Takes all who knock.
    pub(super) fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => self.admit(stream, from),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the fabric's port");
                    return;
                }
            }
        }
    }

    fn admit(&mut self, mut stream: TcpStream, from: SocketAddr) {
        let vacant = self.strangers.iter().position(Option::is_none);
        let at = match vacant {
            Some(at) => at,
            None if self.strangers.len() < MAX_STRANGERS => {
                self.strangers.push(None);
                self.strangers.len() - 1
            }
            None => {
                let waited = |at: &usize| self.strangers[*at].as_ref().map(|stranger| stranger.deadline);
                let oldest = (0..MAX_STRANGERS).min_by_key(waited).unwrap_or(0);
                self.refuse(oldest, Refusal::Crowded);
                oldest
            }
        };
        if self.poll.registry().register(&mut stream, Token(STRANGERS + at), Interest::READABLE).is_ok() {
            self.strangers[at] = Some(Stranger::new(stream, from, Instant::now()));
        }
    }

    /// Turns a stranger away.
    pub(super) fn refuse(&mut self, at: usize, reason: Refusal) {
        let Some(mut stranger) = self.strangers[at].take() else { return };
        let _ = self.poll.registry().deregister(&mut stranger.stream);
        self.refused[reason as usize] += 1;
        self.happened.push_back(Happened::Refused(stranger.from, reason));
    }

    /// A stranger has spoken.
    pub(super) fn hear(&mut self, at: usize) {
        let Some(stranger) = self.strangers.get_mut(at).and_then(Option::as_mut) else { return };
        let (binding, crc) = match stranger.read() {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(reason) => return self.refuse(at, reason),
        };
        match self.ledger.redeem(&binding) {
            Ok(index) => self.recognise(at, index, &binding, crc),
            Err(reason) => self.refuse(at, reason),
        }
    }

    fn recognise(&mut self, at: usize, index: usize, binding: &Binding, crc: bool) {
        let Some(Stranger { mut stream, .. }) = self.strangers[at].take() else { return };
        let _ = self.poll.registry().deregister(&mut stream);
        let Some(qp) = &mut self.slots[index].qp else { return };
        if let Err(error) = stream.set_nodelay(true) {
            return self.fail(index, Disconnect::Io(error.kind()));
        }
        qp.adopt(stream, binding, crc || self.options.crc);
        match self.watch(index) {
            Ok(()) => self.transmit(index),
            Err(error) => self.fail(index, Disconnect::Io(error.kind())),
        }
    }
}
