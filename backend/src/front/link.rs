//! The front's end of the vport's socket: finds the daemon, tells it of the guest, and knows when it is dead.
//!
//! A socket that ends says nothing yet: its process may go on writing to the guest's memory for some microseconds, or the
//! daemon may only have hung up. Only the pidfd it gave us tells that it is dead. While that is open ([`State::Unknown`])
//! new streams wait, so a guest that is refused, or answered by a daemon with another boot number, can rely on the old one
//! being dead.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vsocket_channel::message::{Message, Region};

use crate::carrier::{self, Carrier, Gone};

/// Where the daemon's death is told, in the event loop.
pub const PIDFD: u64 = 5;
/// The daemon is looked for this often while it is absent.
const RETRY: Duration = Duration::from_millis(100);
/// How long QEMU waits for a daemon that does not answer, when it stops the guest.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is known of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It takes streams.
    Up,
    /// It was there, and its socket has ended. It may still be alive.
    Unknown,
    /// There is none.
    Absent,
}

/// What has happened to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// It is there, and it is the one that we knew.
    Returned,
    /// It is there, and knows nothing of us.
    Arrived,
    /// Its socket has ended.
    Lost,
    /// It is dead.
    Dead,
}

/// A daemon that has said who it is.
#[derive(Debug)]
struct Known {
    boot: u64,
    pidfd: OwnedFd,
    /// Where the pidfd is watched. Others have it as well, so closing ours does not end that.
    epoll: Arc<OwnedFd>,
}

impl Known {
    fn new(boot: u64, pidfd: OwnedFd, epoll: &Arc<OwnedFd>) -> Self {
        if let Err(error) = epoll::add(epoll, &pidfd, EventData::new_u64(PIDFD), EventFlags::IN) {
            tracing::warn!(%error, "cannot watch the daemon's process");
        }
        Self { boot, pidfd, epoll: epoll.clone() }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.epoll, &self.pidfd);
    }
}

/// The link.
#[derive(Debug)]
pub struct Link {
    path: PathBuf,
    cid: u64,
    epoll: Arc<OwnedFd>,
    carrier: Option<Carrier>,
    welcomed: bool,
    known: Option<Known>,
    retry_at: Option<Instant>,
    tables: u64,
    /// The daemon has not been told of a reboot, or an end.
    missed: bool,
    /// The guest stands still.
    paused: bool,
    /// What a daemon has given us to keep for this boot of the guest.
    token: Option<u128>,
}

impl Link {
    /// To the daemon that listens at `path`, for the guest with this CID. Its death is watched in `epoll`, as [`PIDFD`].
    pub fn new(path: PathBuf, cid: u64, epoll: Arc<OwnedFd>) -> Self {
        Self {
            path,
            cid,
            epoll,
            carrier: None,
            welcomed: false,
            known: None,
            retry_at: None,
            tables: 0,
            missed: false,
            paused: false,
            token: None,
        }
    }

    /// What is known of the daemon.
    pub fn state(&self) -> State {
        match (self.welcomed, &self.known) {
            (true, _) => State::Up,
            (false, Some(_)) => State::Unknown,
            (false, None) => State::Absent,
        }
    }

    /// When to look for the daemon again.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Looks for the daemon, if it is time; says whether there is a socket to watch.
    pub fn handle_timeout(&mut self, now: Instant) -> bool {
        if self.carrier.is_some() || self.retry_at.is_some_and(|at| now < at) {
            return false;
        }
        self.retry_at = None;
        let hello = Message::FrontHello { pid: std::process::id(), cid: self.cid };
        let reached = carrier::reach(&self.path).and_then(|mut carrier| {
            carrier.send(&hello, vec![]).map_err(io::Error::other)?;
            Ok(carrier)
        });
        match reached {
            Ok(carrier) => self.carrier = Some(carrier),
            Err(error) => {
                tracing::debug!(%error, "no daemon");
                self.retry_at = Some(now + RETRY);
            }
        }
        self.carrier.is_some()
    }

    /// The socket, to be watched for both directions' edges.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.carrier.as_ref().map(Carrier::as_fd)
    }

    /// Takes the next thing the socket has; `None` when there is nothing more.
    pub fn handle_ready(&mut self, now: Instant) -> Option<News> {
        let carrier = self.carrier.as_mut()?;
        let received = carrier.flush().and_then(|()| carrier.receive_with());
        match received {
            Ok(None) => None,
            Ok(Some((Message::FrontWelcome { boot }, Some(pidfd)))) if !self.welcomed => {
                self.welcomed = true;
                let before = self.known.replace(Known::new(boot, pidfd, &self.epoll));
                if before.is_some_and(|before| before.boot == boot) {
                    return Some(News::Returned);
                }
                // It knows of nothing that could have changed.
                self.missed = false;
                Some(News::Arrived)
            }
            Ok(Some((Message::FrontToken { token }, _))) if self.welcomed => {
                self.token = Some(token);
                self.handle_ready(now)
            }
            // To one who did not wait for it any more.
            Ok(Some((Message::FrontQuiet {}, _))) if self.welcomed => self.handle_ready(now),
            Ok(Some((message, _))) => {
                tracing::warn!(?message, "the daemon says what it never should");
                Some(self.lose(now))
            }
            Err(gone) => {
                tracing::info!(reason = %gone, "daemon lost");
                Some(self.lose(now))
            }
        }
    }

    /// Looks whether the daemon is dead.
    pub fn handle_pidfd(&mut self, now: Instant) -> Option<News> {
        let known = self.known.as_ref()?;
        let mut fds = [PollFd::new(&known.pidfd, PollFlags::IN)];
        if !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1)) {
            return None;
        }
        self.known = None;
        self.lose(now);
        Some(News::Dead)
    }

    fn lose(&mut self, now: Instant) -> News {
        (self.carrier, self.welcomed) = (None, false);
        self.retry_at = Some(now + RETRY);
        News::Lost
    }

    /// Tells the daemon of the guest's memory.
    pub fn tell_memory<'a>(&mut self, regions: impl Iterator<Item = (Region, &'a File)>) {
        self.tables += 1;
        for (region, file) in regions {
            match file.try_clone() {
                Ok(file) => {
                    let message = Message::FrontRegion { table: self.tables, region };
                    self.tell(&message, Some(file.into()));
                }
                Err(error) => return tracing::warn!(%error, "cannot hand over the guest's memory"),
            }
        }
    }

    /// The guest stands still: waits until the daemon keeps its hands off the guest's memory, or is dead. It is not
    /// waited for longer than [`PATIENCE`], for QEMU does not answer anybody meanwhile.
    pub fn pause(&mut self) {
        if std::mem::replace(&mut self.paused, true) || !self.tell(&Message::FrontPaused {}, None) {
            return;
        }
        let end = Instant::now() + PATIENCE;
        while let (Some(carrier), Some(known)) = (&mut self.carrier, &self.known) {
            let gone = match carrier.flush().and_then(|()| carrier.receive_with()) {
                Ok(Some((Message::FrontQuiet {}, _))) => return,
                Ok(Some((Message::FrontToken { token }, _))) => {
                    self.token = Some(token);
                    continue;
                }
                Ok(Some(_)) => continue,
                Ok(None) => false,
                Err(_) => true,
            };
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = vec![PollFd::new(&known.pidfd, PollFlags::IN)];
            if !gone {
                fds.push(PollFd::new(carrier, PollFlags::IN));
            }
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    return tracing::error!(
                        "the daemon does not say that it leaves the guest's memory alone"
                    );
                }
                // Dead; the event loop hears of it as well.
                Ok(_) if !fds[0].revents().is_empty() => return,
                _ => {}
            }
        }
    }

    /// The guest goes on, unless it has booted, or never stood still.
    pub fn tell_resumed(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.tell(&Message::FrontResumed {}, None);
        }
    }

    /// Hands a stream over; false if there is nobody who takes it.
    pub fn tell_stream(&mut self, id: u64, guest_port: u32, host_port: u32, end: OwnedFd) -> bool {
        self.tell(&Message::FrontStream { id, guest_port, host_port }, Some(end))
    }

    /// The guest has rebooted.
    pub fn tell_reset(&mut self) {
        (self.paused, self.token) = (false, None);
        self.missed |= !self.tell(&Message::FrontReset {}, None);
    }

    /// The guest is gone.
    pub fn tell_gone(&mut self) {
        (self.paused, self.token) = (false, None);
        self.missed |= !self.tell(&Message::FrontGone {}, None);
    }

    /// What happened while the daemon was not there, and what one before it has given us to keep. Of a guest that went and
    /// came back, the later boot counts.
    pub fn tell_what_was_missed(&mut self) {
        if std::mem::take(&mut self.missed) {
            self.missed = !self.tell(&Message::FrontGone {}, None);
        }
        if let Some(token) = self.token {
            self.tell(&Message::FrontToken { token }, None);
        }
        if self.paused {
            self.tell(&Message::FrontPaused {}, None);
        }
    }

    fn tell(&mut self, message: &Message, fd: Option<OwnedFd>) -> bool {
        let Some(carrier) = self.carrier.as_mut().filter(|_| self.welcomed) else { return false };
        match carrier.send(message, fd.into_iter().map(Arc::new).collect()) {
            Ok(()) => true,
            // The socket's end comes as an event of its own.
            Err(Gone::Closed) => false,
            Err(gone) => {
                tracing::warn!(reason = %gone, "the daemon does not take messages");
                self.lose(Instant::now());
                false
            }
        }
    }
}
