//! What the agent's socket does not take at once.
//!
//! The socket holds a few hundred messages, and a program with many connections has more to say when all of them are prepared, or
//! closed, in one go. Nothing of that may be lost: a connection that was not told as prepared would stay on TCP and keep its peer
//! there, and one not told as closed would keep its record. So it waits, in order, for the next message from the agent, which says
//! when it has read what was there, or for a call that comes a moment later.

use super::Client;
use super::resuming::{LATER, due_in, due_now};
use crate::carrier::Carrier;
use rustix::fd::BorrowedFd;
use std::io;
use std::sync::atomic::Ordering;
use vsocket_channel::message::Message;

impl Client {
    /// Tells the agent, as soon as its socket takes it. Without an agent there is nothing to tell: the next is told what it is to know.
    pub(super) fn tell(&self, message: Message) {
        if self.carrier.is_some() {
            self.outbox.borrow_mut().push_back(message);
            self.send_waiting();
        }
    }

    /// Tells the agent something that whoever asks says again if it was not taken; whether it was.
    pub(super) fn tell_now(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> bool {
        self.send_waiting();
        let Some(carrier) = self.carrier.as_ref().filter(|_| self.outbox.borrow().is_empty()) else {
            return false;
        };
        carrier.send(message, fds).is_ok()
    }

    /// Sends what waits, as far as the socket takes it.
    pub(super) fn send_waiting(&self) {
        let (Some(carrier), mut outbox) = (&self.carrier, self.outbox.borrow_mut()) else { return };
        let mut asked = false;
        while let Some(message) = outbox.front() {
            match self.send(carrier, message) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if asked {
                        // For who makes calls all the time; who sleeps is told.
                        return due_in(LATER);
                    }
                    asked = true;
                    if let Some(shared) = &self.shared {
                        // Before the second attempt: if that fails as well, the agent has something left to read, and sees it then.
                        shared.records.header().behind.store(1, Ordering::SeqCst);
                    }
                }
                sent => {
                    if sent.is_err() {
                        // If the agent has died, the next look at the socket tells. Who is busy makes none by itself.
                        due_now();
                    }
                    outbox.pop_front();
                }
            }
        }
    }

    fn send(&self, carrier: &Carrier, message: &Message) -> io::Result<()> {
        match message {
            Message::Prepared { conn, .. } => {
                let conn = u32::try_from(*conn).ok().and_then(|record| self.conns.get(&record));
                // Who has been closed meanwhile says so next.
                conn.map_or(Ok(()), |conn| carrier.send(message, &[conn.anchor()]))
            }
            _ => carrier.send(message, &[]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agents_socket_does_not_take_is_said_later_in_order() {
        let (near, far) = Carrier::pair().unwrap();
        let mut client = Client::new();
        client.tell(Message::Closed { record: 0 });
        assert!(client.outbox.borrow().is_empty(), "there is no agent to tell");
        client.carrier = Some(near);
        (0..2000).for_each(|record| client.tell(Message::Closed { record }));
        let waiting = client.outbox.borrow().len();
        assert!(waiting > 0 && waiting < 2000, "{waiting}");
        assert!(!client.tell_now(&Message::Shut { record: 7 }, &[]), "it would overtake the others");
        let mut heard = 0;
        while heard < 2000 {
            match far.recv() {
                Ok(Some(packet)) => {
                    assert_eq!(packet.message, Ok(Message::Closed { record: heard }));
                    heard += 1;
                }
                _ => client.send_waiting(),
            }
        }
        assert!(client.outbox.borrow().is_empty());
        assert!(client.tell_now(&Message::Shut { record: 7 }, &[]));
        drop(far);
        client.tell(Message::Closed { record: 1 });
        assert!(client.outbox.borrow().is_empty(), "nobody hears it");
    }
}
