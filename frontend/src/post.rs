//! Messages on their way out: what the socket does not take at once waits in a bounded queue.

use crate::carrier::{Carrier, Packet, Stream};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use vsocket_channel::message::Message;

/// Most messages that wait for a neighbour which does not read.
const MOST_QUEUED: usize = 4 * crate::record::RECORDS as usize;

/// Descriptors beside a message, in groups that several messages share.
pub type Parcel = Vec<Arc<Vec<OwnedFd>>>;

/// What carries the messages.
#[derive(Debug)]
enum Line {
    Packets(Carrier),
    Stream(Box<Stream>),
}

/// A control connection with its queue.
#[derive(Debug)]
pub struct Post {
    line: Line,
    queue: VecDeque<(Message, Parcel)>,
}

impl Post {
    /// A connection with nothing under way.
    pub fn new(carrier: Carrier) -> Self {
        Self { line: Line::Packets(carrier), queue: VecDeque::new() }
    }

    /// A connection on a stream, which carries no descriptors.
    pub fn over(stream: Stream) -> Self {
        Self { line: Line::Stream(Box::new(stream)), queue: VecDeque::new() }
    }

    /// Sends a message, now or as soon as the socket takes it. How many messages the socket took.
    ///
    /// # Errors
    ///
    /// The connection is of no use any more: it is broken, or its reader is too far behind.
    pub fn send(&mut self, message: Message, parcel: Parcel) -> io::Result<u32> {
        // Nobody counts nudges: one that waits already says the same.
        let nudge = matches!(message, Message::Nudge { .. });
        if nudge && self.queue.iter().rev().take(64).any(|(waiting, _)| *waiting == message) {
            return Ok(0);
        }
        if self.queue.len() >= MOST_QUEUED {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the reader is too far behind"));
        }
        self.queue.push_back((message, parcel));
        self.flush()
    }

    /// Sends what waits. How many messages the socket took.
    ///
    /// # Errors
    ///
    /// The connection is broken.
    pub fn flush(&mut self) -> io::Result<u32> {
        let mut sent = 0;
        while let Some((message, parcel)) = self.queue.front() {
            let taken = match &mut self.line {
                Line::Packets(carrier) => {
                    let fds: Vec<BorrowedFd<'_>> =
                        parcel.iter().flat_map(|g| g.iter().map(AsFd::as_fd)).collect();
                    carrier.send(message, &fds)
                }
                Line::Stream(stream) => stream.send(message),
            };
            match taken {
                Ok(()) => {
                    self.queue.pop_front();
                    sent += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match &mut self.line {
            Line::Packets(_) => Ok(sent),
            Line::Stream(stream) => match stream.flush() {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                _ => Ok(sent),
            },
        }
    }

    /// Whether something waits for the socket to take it, or for the connection to be made.
    pub fn waits(&mut self) -> bool {
        let under_way = match &mut self.line {
            Line::Packets(_) => false,
            Line::Stream(stream) => stream.flush().is_err(),
        };
        under_way || !self.queue.is_empty()
    }

    /// The connection's descriptor, for what is no message; what waits is forgotten.
    pub fn into_fd(self) -> OwnedFd {
        match self.line {
            Line::Packets(carrier) => carrier.into(),
            Line::Stream(stream) => stream.into_fd(),
        }
    }

    /// The next packet; `None` at the end of the connection.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when none is there.
    pub fn recv(&mut self) -> io::Result<Option<Packet>> {
        match &mut self.line {
            Line::Packets(carrier) => carrier.recv(),
            Line::Stream(stream) => Ok(stream.recv()?.map(|message| Packet { message, fds: Vec::new() })),
        }
    }
}

impl AsFd for Post {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.line {
            Line::Packets(carrier) => carrier.as_fd(),
            Line::Stream(stream) => stream.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_socket_does_not_take_waits_and_nudges_do_not_pile_up() {
        let path = std::env::temp_dir().join(format!("vsocket-post-{}", std::process::id()));
        let listener = Carrier::listen(&path).unwrap();
        let mut post = Post::new(Carrier::connect(&path).unwrap());
        let far = Carrier::accept(&listener).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut taken = 0;
        for n in 0..1000 {
            taken += post.send(Message::Ping { n }, Vec::new()).unwrap();
        }
        assert!(taken > 0 && taken < 1000, "{taken}");
        for _ in 0..1000 {
            assert_eq!(post.send(Message::Nudge { record: 7 }, Vec::new()).unwrap(), 0);
        }
        assert_eq!(post.queue.len(), 1001 - taken as usize);
        let mut seen = 0;
        loop {
            match far.recv() {
                Ok(Some(packet)) if seen < 1000 => assert_eq!(packet.message, Ok(Message::Ping { n: seen })),
                Ok(Some(packet)) => {
                    assert_eq!(packet.message, Ok(Message::Nudge { record: 7 }));
                    break;
                }
                _ => {
                    taken += post.flush().unwrap();
                    continue;
                }
            }
            seen += 1;
        }
        assert_eq!((seen, taken), (1000, 1001));
        drop(far);
        assert!(post.send(Message::Ping { n: 0 }, Vec::new()).is_err());
    }
}
