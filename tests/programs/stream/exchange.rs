//! Two directions at once.

use crate::streams::*;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Both directions of a connection until both have ended, in two threads or in one with an event loop.
pub fn exchange(
    stream: TcpStream,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    epoll: bool,
    at_eof: &AtomicBool,
) -> Report {
    let (mut sender, mut receiver) = (sender, receiver);
    let mut report = Report::default();
    let result = if epoll {
        by_events(stream, &mut sender, &mut receiver, at_eof)
    } else {
        by_threads(&stream, &mut sender, &mut receiver, at_eof)
    };
    report.sent = sender.map_or(0, |s| s.sent);
    report.end = "eof";
    report.ended(result);
    if let Some(receiver) = receiver {
        report.received = receiver.received;
        match receiver.finish() {
            Ok(digest) => report.digest = digest,
            Err(error) => drop(report.error.get_or_insert(error)),
        }
    }
    report
}

pub fn by_threads(
    stream: &TcpStream,
    sender: &mut Option<Sender>,
    receiver: &mut Option<Receiver>,
    at_eof: &AtomicBool,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let out = scope.spawn(|| -> io::Result<()> {
            let (Some(sender), mut to) = (sender, stream) else { return Ok(()) };
            while sender.begins_at_eof && !at_eof.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            while sender.pump(&mut to)? == Pumped::More {}
            stream.shutdown(Shutdown::Write)
        });
        let read = || -> io::Result<()> {
            let (Some(receiver), mut from) = (receiver, stream) else { return Ok(()) };
            while receiver.pump(&mut from)? == Pumped::More {}
            Ok(())
        };
        let result = read();
        at_eof.store(true, Ordering::Relaxed);
        if result.is_err() {
            // Else the other thread might write for ever to one who does not read.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = out.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")));
        result.and(sent)
    })
}

pub fn by_events(
    stream: TcpStream,
    sender: &mut Option<Sender>,
    receiver: &mut Option<Receiver>,
    at_eof: &AtomicBool,
) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut stream = mio::net::TcpStream::from_std(stream);
    let mut poll = mio::Poll::new()?;
    let interest = mio::Interest::READABLE | mio::Interest::WRITABLE;
    poll.registry().register(&mut stream, mio::Token(0), interest)?;
    let mut events = mio::Events::with_capacity(4);
    let (mut sending, mut receiving) = (sender.is_some(), receiver.is_some());
    // Edge-triggered: each side is worked until it would block, a piece at a time. While one goes on, the other's edge is
    // looked for: a paced sender might never block, and its reader would starve.
    let (mut can_read, mut can_write) = (true, true);
    while sending || receiving {
        let idle = !(sending && can_write || receiving && can_read);
        if idle || (sending && !can_write) || (receiving && !can_read) {
            poll.poll(&mut events, (!idle).then_some(Duration::ZERO))?;
            for event in &events {
                can_read |= event.is_readable() || event.is_read_closed() || event.is_error();
                can_write |= event.is_writable() || event.is_write_closed() || event.is_error();
            }
        }
        if let (true, true, Some(receiver)) = (receiving, can_read, receiver.as_mut()) {
            match receiver.pump(&mut stream) {
                Ok(Pumped::More) => {}
                Ok(Pumped::Done) => {
                    receiving = false;
                    at_eof.store(true, Ordering::Relaxed);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => can_read = false,
                Err(e) => return Err(e),
            }
        }
        if let (true, true, Some(sender)) = (sending, can_write, sender.as_mut()) {
            match sender.pump(&mut stream) {
                Ok(Pumped::More) => {}
                Ok(Pumped::Done) => {
                    sending = false;
                    stream.shutdown(Shutdown::Write)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => can_write = false,
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}
