//! The control protocol on a byte stream, as a virtual machine has it to its host: one message follows another, without
//! descriptors. What the kernel takes or gives of a message is kept until the rest follows.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::io;
use vsocket_channel::message::{MESSAGE_LEN, Malformed, Message};

/// One end of a control connection on a stream. Never blocks.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    /// The kernel has not said yet whether there is somebody.
    connecting: bool,
    /// Of the message that is on its way out: where the rest begins.
    out: [u8; MESSAGE_LEN],
    sent: usize,
    /// Of the message that arrives: how much is there.
    image: [u8; MESSAGE_LEN],
    have: usize,
}

impl Stream {
    /// A stream that is connected, or (`connecting`) about to be. It must be non-blocking.
    pub fn new(fd: OwnedFd, connecting: bool) -> Self {
        let (out, image) = ([0; MESSAGE_LEN], [0; MESSAGE_LEN]);
        Self { fd, connecting, out, sent: MESSAGE_LEN, image, have: 0 }
    }

    /// Takes a message, and sends what the kernel takes of it.
    ///
    /// # Errors
    ///
    /// `WouldBlock`: the message was not taken, as the one before is still on its way. Others: the stream is of no use.
    pub fn send(&mut self, message: &Message) -> io::Result<()> {
        self.flush()?;
        (self.out, self.sent) = (message.encode(), 0);
        match self.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            done => done,
        }
    }

    /// Sends what waits.
    ///
    /// # Errors
    ///
    /// `WouldBlock` while something is left, or the connection is being made. Others: the stream is of no use.
    pub fn flush(&mut self) -> io::Result<()> {
        self.finish_connecting()?;
        while self.sent < MESSAGE_LEN {
            match rustix::net::send(
                &self.fd,
                &self.out[self.sent..],
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn finish_connecting(&mut self) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        if !self.connecting {
            return Ok(());
        }
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&zero))? == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        rustix::net::sockopt::socket_error(&self.fd)??;
        self.connecting = false;
        Ok(())
    }

    /// The next message, or what is wrong with it; `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when no whole one is there.
    pub fn recv(&mut self) -> io::Result<Option<Result<Message, Malformed>>> {
        self.finish_connecting()?;
        while self.have < MESSAGE_LEN {
            match rustix::net::recv(&self.fd, &mut self.image[self.have..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Ok(None),
                Ok((n, _)) => self.have += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.have = 0;
        Ok(Some(Message::decode(&self.image)))
    }

    /// The stream alone, for bytes that are no messages.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn blocks<T: std::fmt::Debug>(result: io::Result<T>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_message_that_comes_in_pieces_is_whole_in_the_end() {
        let (a, b) = pair();
        let mut b = Stream::new(b, false);
        let bytes = [Message::Ping { n: 1 }.encode(), Message::Ping { n: 2 }.encode()].concat();
        let mut seen = Vec::new();
        for piece in bytes.chunks(100) {
            rustix::io::write(&a, piece).unwrap();
            while let Ok(message) = b.recv() {
                seen.push(message);
            }
            blocks(b.recv());
        }
        assert_eq!(seen, [1, 2].map(|n| Some(Ok(Message::Ping { n }))));
        drop(a);
        assert!(b.recv().unwrap().is_none());
    }

    #[test]
    fn nothing_is_lost_at_a_full_stream() {
        let (a, b) = pair();
        let (mut a, mut b) = (Stream::new(a, false), Stream::new(b, false));
        let (mut sent, mut seen) = (0, 0);
        while seen < 5000 {
            if sent < 5000 && a.send(&Message::Ping { n: sent }).is_ok() {
                sent += 1;
                continue;
            }
            // Full, or all is taken.
            let _ = a.flush();
            while let Ok(Some(message)) = b.recv() {
                assert_eq!(message, Ok(Message::Ping { n: seen }));
                seen += 1;
            }
        }
        assert_eq!(sent, 5000);
    }
}
