//! The control connection to each other backend.
//!
//! One thread of its own holds them all, so that TLS never keeps the data thread waiting. It listens and dials, proves
//! who is there, and passes on whole checked messages; it does not know what they mean, and answers none of them: a
//! pong comes from the data thread, so that it proves the data thread alive.
//!
//! ```text
//!   data thread                                  peer thread
//!   PeerHandle::send ─── commands, waker ──────> links ── TLS ── other backend
//!   Receiver<PeerEvent> <── events, wake() ─────   │
//!                                                  └── listener: strangers are refused by name
//! ```
//!
//! Both ends dial. When two connections meet, both ends keep the same one: a new start of the process (its boot number)
//! beats an old one, a redial beats what it replaces, and otherwise the one that the host with the smaller name dialled
//! stays. A link that ends is dialled again after 0.1 s, and then ever less often down to every 2 s; a
//! backend that comes back dials at once, so it does not wait for that.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, unbounded};
use mio::Waker;

use crate::config::Backends;
use message::{HostName, MessageError, PeerMessage};

mod connection;
mod links;
pub mod message;
mod tls;

pub use tls::Error as TlsError;

/// What the data thread hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// A peer is there, proven by its certificate.
    Up {
        /// Which.
        host: HostName,
        /// Which start of its process.
        boot_id: u64,
    },
    /// A peer says something.
    Message {
        /// Which.
        host: HostName,
        /// What. Never a `Hello`.
        message: PeerMessage,
    },
    /// A peer is gone: what was agreed with it is void. Another `Up` may follow at once.
    Down {
        /// Which.
        host: HostName,
        /// Why.
        reason: Down,
    },
    /// A connection, ours or to us, did not get as far as `Up`.
    Refused {
        /// The other end's address.
        from: SocketAddr,
        /// Why.
        reason: Refusal,
    },
}

/// Why a peer that was up is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// It closed, or its process died.
    Closed,
    /// The connection failed.
    Io(io::ErrorKind),
    /// It broke TLS.
    Tls(Refusal),
    /// It broke our protocol.
    Message(MessageError),
    /// It said hello twice.
    SecondHello,
    /// It takes nothing any more.
    Overrun,
    /// Another connection with it took over.
    Replaced,
    /// [`PeerHandle::reset`] was called.
    Reset,
}

impl Down {
    /// A short name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Io(_) => "io",
            Self::Tls(reason) => reason.name(),
            Self::Message(error) => error.name(),
            Self::SecondHello => "second_hello",
            Self::Overrun => "overrun",
            Self::Replaced => "replaced",
            Self::Reset => "reset",
        }
    }
}

/// Why a connection was refused before it was anybody's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Its first bytes are not TLS.
    NotTls,
    /// It does not speak our TLS (1.3).
    Incompatible,
    /// Its certificate is not signed by our authority.
    WrongAuthority,
    /// Its certificate is not for the host we dialled.
    WrongName,
    /// Its certificate is not valid now.
    Expired,
    /// Its certificate is bad in another way.
    BadCertificate,
    /// It shows no certificate.
    NoCertificate,
    /// It refuses us.
    RejectedByPeer,
    /// TLS fails in another way.
    Handshake,
    /// Its certificate is good, but of no configured peer.
    UnknownPeer,
    /// It says another host's name than its certificate.
    HelloMismatch,
    /// It does not begin with a hello.
    NoHello,
    /// Its message is wrong.
    Message(MessageError),
    /// It was not ready in time.
    TimedOut,
    /// It hung up before it was ready.
    HungUp,
    /// Newer strangers pushed it out.
    Crowded,
}

impl Refusal {
    /// A short name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotTls => "not_tls",
            Self::Incompatible => "incompatible_tls",
            Self::WrongAuthority => "wrong_authority",
            Self::WrongName => "wrong_name",
            Self::Expired => "expired",
            Self::BadCertificate => "bad_certificate",
            Self::NoCertificate => "no_certificate",
            Self::RejectedByPeer => "rejected_by_peer",
            Self::Handshake => "handshake",
            Self::UnknownPeer => "unknown_peer",
            Self::HelloMismatch => "hello_mismatch",
            Self::NoHello => "no_hello",
            Self::Message(error) => error.name(),
            Self::TimedOut => "timed_out",
            Self::HungUp => "hung_up",
            Self::Crowded => "crowded",
        }
    }
}

/// Why the peer thread cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Certificates.
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
    /// The listening socket.
    #[error("cannot listen for peers on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Readiness notification of the operating system.
    #[error("cannot set up readiness notification")]
    Readiness(#[source] io::Error),
    /// The thread.
    #[error("cannot start the peer thread")]
    Thread(#[source] io::Error),
}

enum Command {
    Send(HostName, PeerMessage),
    Reset(HostName),
    Stop,
}

/// Speaks to the peer thread; cheap to clone.
#[derive(Clone)]
pub struct PeerHandle {
    commands: Sender<Command>,
    waker: Arc<Waker>,
}

impl PeerHandle {
    /// Sends a message if the peer is up; if it is not, the message is dropped, and `Down` has told or will tell.
    pub fn send(&self, host: &HostName, message: PeerMessage) {
        self.command(Command::Send(host.clone(), message));
    }

    /// Gives the connection up, as after a ping that was not answered. `Down` follows, and a new attempt.
    pub fn reset(&self, host: &HostName) {
        self.command(Command::Reset(host.clone()));
    }

    fn command(&self, command: Command) {
        // Neither fails unless the thread has ended, and then nobody is up.
        let _ = self.commands.send(command);
        let _ = self.waker.wake();
    }
}

/// The peer thread; stopped and waited for when this is dropped.
pub struct Peers {
    handle: PeerHandle,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Peers {
    /// Starts listening and dialling. `wake` is called on the peer thread after events were added to the channel.
    pub fn start(
        config: &Backends,
        host: &HostName,
        boot_id: u64,
        wake: impl Fn() + Send + 'static,
    ) -> Result<(Self, Receiver<PeerEvent>), Error> {
        let (commands, inbox) = unbounded();
        let (outbox, events) = unbounded();
        let links = links::Links::new(config, host, boot_id, inbox, outbox, Box::new(wake))?;
        let handle = PeerHandle { commands, waker: links.waker() };
        let address = links.address();
        let run = move || links.run();
        let thread = thread::Builder::new().name("peers".into()).spawn(run).map_err(Error::Thread)?;
        Ok((Self { handle, address, thread: Some(thread) }, events))
    }

    /// How to speak to it.
    pub fn handle(&self) -> PeerHandle {
        self.handle.clone()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.handle.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
