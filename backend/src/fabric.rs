//! What joins two backends: verbs semantics behind one trait.
//!
//! The trait says what libibverbs, and user space over TCP, can both do well, and nothing that only one of them can:
//! no immediate data, no shared receive queues, no atomics, no RDMA READ. A user that is correct on
//! [`loopback`] and [`soft`] is correct on an RNIC, which `verbs` drives.
//!
//! # Contract
//!
//! - A [`DomainId`] is a protection domain: steering tags of one domain mean nothing on queue pairs of another. The
//!   daemon has one per (VNI, peer), so a tenant's memory cannot be named from another tenant's queue pair.
//! - A queue pair comes to be in three steps, whose two [`Endpoint`]s travel on a connection that both hosts trust:
//!   [`expect`](Fabric::expect) gives an offer, [`dial`](Fabric::dial) with that offer gives an answer, and
//!   [`accept`](Fabric::accept) takes it. It is [`Event::Connected`] only when the one-time secret has come through the
//!   queue pair itself.
//! - A queue pair ([`QpId`]) is reliable and ordered. A WRITE has reached the remote region before the SEND posted after
//!   it is reported there. Nothing is reported for a WRITE at the remote side.
//! - A *completion* with [`Status::Done`] says that the fabric will not read the local memory of that work request
//!   again. It says nothing about the peer; only an answer from the peer does.
//! - Any error ends the queue pair: outstanding work requests complete with [`Status::Flushed`], and
//!   [`Event::Disconnected`] is the last event that names it. A wrong steering tag, a wrong range or a missing right is
//!   such an error, found by the *target*, which says so to the initiator ([`Disconnect::Terminated`]).
//! - After [`Fabric::deregister`] returns no peer can touch the region; a WRITE that names it ends its queue pair, as on
//!   an RNIC, so take the lane back before the memory.
//! - A fabric on an RNIC hears of a remote error only that it was one ([`Fault::Refused`]), and of a peer whose process
//!   died only when it next sends, or from the connection that the daemons keep beside the fabric.
//!
//! # Driving it
//!
//! One thread owns a fabric. A turn of its loop: post what there is, [`flush`](Fabric::flush) once, take events with
//! [`poll`](Fabric::poll) until `None`. Before it sleeps on the descriptor ([`AsFd`]) and
//! [`next_deadline`](Fabric::next_deadline) it says so ([`rest`](Fabric::rest)) and polls until `None` once more; skipping
//! either may lose the wake-up. A loop that does not sleep need not: being woken may cost system calls, polling does not.
//! Nothing here allocates per message once queues have reached their working size.
//!
//! ```
//! use vsocket_backend::fabric::{loopback, Event, Fabric, Signal, WorkId};
//!
//! let (mut a, mut b) = loopback::pair()?;
//! let (dom_a, dom_b) = (a.open_domain(), b.open_domain());
//! let secret = [7; 32];
//! let (qp_b, offer) = b.expect(dom_b, 100, secret, std::time::Instant::now())?;
//! let (qp_a, answer) = a.dial(dom_a, 100, secret, &offer, std::time::Instant::now())?;
//! b.accept(qp_b, &answer)?;
//! assert!(matches!(a.poll(), Some(Event::Connected { qp }) if qp == qp_a));
//! assert!(matches!(b.poll(), Some(Event::Connected { qp }) if qp == qp_b));
//! a.post_send(qp_a, WorkId(1), &[b"hello, ", b"peer"], Signal::No)?;
//! a.flush();
//! assert!(matches!(b.poll(), Some(Event::Received { payload: b"hello, peer", .. })));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Instant;

pub mod endpoint;
pub mod fault;
pub mod loopback;
pub mod memory;
pub mod registry;
pub mod soft;
#[cfg(feature = "verbs")]
pub mod verbs;

pub use endpoint::{Endpoint, Kind};
pub use memory::Region;

/// The longest payload of one SEND.
pub const MAX_SEND: usize = 16 << 10;

/// The longest WRITE that one work request may carry.
pub const MAX_WRITE: usize = 1 << 30;

/// The pieces one SEND may be gathered from.
pub const MAX_GATHER: usize = 8;

/// A one-time secret that binds a fabric connection to the control connection on which it was agreed.
pub type Secret = [u8; 32];

/// A new secret, from the operating system.
pub fn new_secret() -> Result<Secret, Error> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|_| Error::Entropy)?;
    Ok(secret)
}

/// A protection domain of one fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DomainId(pub u32);

/// A queue pair of one fabric. Never used twice, so that a late event cannot be taken for another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QpId(pub u64);

/// The poster's own number of a work request; comes back in its completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkId(pub u64);

/// Whether success is worth an event. Failure always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Report completion.
    Yes,
    /// Report only failure.
    No,
}

/// What a peer may do with a registered region. The owner may always post from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Source of WRITEs only; the peer cannot name it.
    Local,
    /// The peer may WRITE into it.
    RemoteWrite,
}

/// What registration gives: how to name the region here and there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryKey {
    /// Names the region in this side's work requests.
    pub lkey: u32,
    /// The steering tag by which the peer names it.
    pub rkey: u32,
    /// The remote address of the region's first byte. Not a host address, and not always zero.
    pub base: u64,
}

/// A range of a region registered here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalRange {
    /// The region's [`MemoryKey::lkey`].
    pub lkey: u32,
    /// Bytes from the region's beginning.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

/// Where a WRITE goes at the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddress {
    /// The peer's [`MemoryKey::rkey`].
    pub rkey: u32,
    /// The peer's [`MemoryKey::base`] plus the offset in its region.
    pub address: u64,
}

/// How a work request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The fabric has done with the local memory.
    Done,
    /// The queue pair failed first; whether the peer has it is unknown.
    Flushed,
}

/// Why a queue pair is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disconnect {
    /// The peer's end is closed or its process is gone.
    PeerClosed,
    /// The peer found an error in what we sent and said which.
    Terminated(Fault),
    /// We found an error in what the peer sent and told it.
    PeerFault(Fault),
    /// What the peer sent is no protocol at all.
    Malformed(&'static str),
    /// The carrier failed.
    Io(io::ErrorKind),
    /// The connection was not there in time.
    TimedOut,
    /// The other end does not take us: wrong secret, version or VNI.
    Rejected,
    /// The device has been removed, or must be opened anew.
    DeviceGone,
    /// [`Fabric::close`] was called.
    Closed,
}

impl Disconnect {
    /// A short name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PeerClosed => "peer_closed",
            Self::Terminated(_) => "terminated",
            Self::PeerFault(_) => "peer_fault",
            Self::Malformed(_) => "malformed",
            Self::Io(_) => "io",
            Self::TimedOut => "timed_out",
            Self::Rejected => "rejected",
            Self::DeviceGone => "device_gone",
            Self::Closed => "closed",
        }
    }
}

/// What a TERMINATE tells: the class of a remote error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The steering tag names nothing.
    InvalidTag,
    /// The range is not inside the region.
    Bounds,
    /// The region does not allow this.
    AccessRights,
    /// The tag belongs to another protection domain.
    WrongDomain,
    /// Offset plus length does not fit 64 bits.
    Wrap,
    /// One of the above; the device does not tell which.
    Refused,
    /// Any other layer, type and code.
    Other {
        /// 0 RDMAP, 1 DDP, 2 MPA.
        layer: u8,
        /// Error type within the layer.
        kind: u8,
        /// Error code within the type.
        code: u8,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidTag => f.write_str("invalid steering tag"),
            Self::Bounds => f.write_str("range outside the region"),
            Self::AccessRights => f.write_str("access not allowed"),
            Self::WrongDomain => f.write_str("steering tag of another domain"),
            Self::Wrap => f.write_str("offset wraps"),
            Self::Refused => f.write_str("remote access refused"),
            Self::Other { layer, kind, code } => write!(f, "layer {layer}, type {kind}, code {code}"),
        }
    }
}

/// Why a stranger's fabric connection was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The first bytes are not a fabric's.
    BadMagic,
    /// A revision, flag or version we do not speak.
    WrongVersion,
    /// The request promises more private data than is allowed.
    Oversized,
    /// The private data are not of our form.
    Malformed,
    /// Nobody agreed on this secret.
    UnknownSecret,
    /// The secret has served already.
    ReusedSecret,
    /// The secret was agreed for another VNI.
    WrongVni,
    /// The request was not complete in time.
    TimedOut,
    /// The stranger hung up first.
    HungUp,
    /// Newer strangers pushed this one out.
    Crowded,
}

impl Refusal {
    /// All of them, in counter order.
    pub const ALL: [Self; 10] = [
        Self::BadMagic,
        Self::WrongVersion,
        Self::Oversized,
        Self::Malformed,
        Self::UnknownSecret,
        Self::ReusedSecret,
        Self::WrongVni,
        Self::TimedOut,
        Self::HungUp,
        Self::Crowded,
    ];

    /// The counter's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadMagic => "bad_magic",
            Self::WrongVersion => "wrong_version",
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::UnknownSecret => "unknown_secret",
            Self::ReusedSecret => "reused_secret",
            Self::WrongVni => "wrong_vni",
            Self::TimedOut => "timed_out",
            Self::HungUp => "hung_up",
            Self::Crowded => "crowded",
        }
    }
}

/// Something happened. The payload lives until the next call of [`Fabric::poll`].
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The queue pair works in both directions.
    Connected {
        /// Which.
        qp: QpId,
    },
    /// A SEND of the peer, whole.
    Received {
        /// Where it came in.
        qp: QpId,
        /// Its bytes, in private memory.
        payload: &'a [u8],
    },
    /// A work request ended.
    Completed {
        /// Where it was posted.
        qp: QpId,
        /// Its number.
        work: WorkId,
        /// How.
        status: Status,
    },
    /// There is room again after [`PostError::Full`].
    Room {
        /// Where.
        qp: QpId,
    },
    /// The queue pair is no more; nothing else will be heard of it.
    Disconnected {
        /// Which.
        qp: QpId,
        /// Why.
        reason: Disconnect,
    },
    /// A stranger was turned away.
    Refused {
        /// Its address.
        from: SocketAddr,
        /// Why.
        reason: Refusal,
    },
}

/// Why a work request was not taken. Nothing of it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// Wait for [`Event::Room`].
    #[error("the send queue is full")]
    Full,
    /// Not yet, or no longer, connected.
    #[error("the queue pair is not connected")]
    NotConnected,
    /// The lkey names nothing in the queue pair's domain.
    #[error("no such local region in this domain")]
    UnknownRegion,
    /// The local range is not inside its region.
    #[error("local range outside its region")]
    Bounds,
    /// More than [`MAX_SEND`], [`MAX_WRITE`] or [`MAX_GATHER`].
    #[error("too long for one work request")]
    TooLong,
}

/// What else can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The listening socket.
    #[error("cannot listen on {address}")]
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
    /// The outgoing connection.
    #[error("cannot dial {address}")]
    Dial {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The domain is not open.
    #[error("no such protection domain")]
    UnknownDomain,
    /// The key was never given out, or was taken back.
    #[error("no such memory key")]
    UnknownKey,
    /// The secret is in use or has been.
    #[error("this secret has been used before")]
    ReusedSecret,
    /// No room for more regions.
    #[error("too many registered regions")]
    TooManyRegions,
    /// No entropy for steering tags.
    #[error("the system gives no random bytes")]
    Entropy,
    /// The other end has another fabric than ours.
    #[error("the other end has {theirs}, this one {ours}")]
    WrongKind {
        /// Its kind.
        theirs: &'static str,
        /// Our kind.
        ours: &'static str,
    },
    /// The other end's half of the agreement makes no sense.
    #[error("the other end's half of the agreement cannot be: {0}")]
    BadEndpoint(&'static str),
    /// There is no device that could be used, and why.
    #[error("no usable RDMA device: {0}")]
    NoDevice(String),
    /// The device has no more of these.
    #[error("the device has no more than {limit} {what}")]
    Exhausted {
        /// Of what.
        what: &'static str,
        /// How many it has.
        limit: usize,
    },
    /// The device, or its driver, did not give something.
    #[error("the RDMA device gives no {what}")]
    Device {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The queue pair is not waiting for an answer.
    #[error("no queue pair waits for this answer")]
    NotExpected,
}

/// What a fabric stands on and holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The RDMA device.
    pub device: Option<String>,
    /// Its port.
    pub port: Option<u8>,
    /// Its address, and the kind of packets.
    pub gid: Option<String>,
    /// The port's MTU in bytes.
    pub mtu: Option<u32>,
    /// Queue pairs, also those in the making.
    pub queue_pairs: usize,
    /// Registered regions.
    pub regions: usize,
}

/// Verbs, reduced to what is portable. See the module's contract.
pub trait Fabric: Send + AsFd {
    /// Which fabric this is.
    fn kind(&self) -> Kind;

    /// What it stands on and holds, for the operator.
    fn facts(&self) -> Facts;

    /// A new protection domain.
    fn open_domain(&mut self) -> DomainId;

    /// Closes a domain with its queue pairs (as [`close`](Self::close) does) and regions.
    fn close_domain(&mut self, domain: DomainId);

    /// Makes memory known to a domain. The region's guard is kept until it is deregistered and no longer in use by a
    /// posted WRITE.
    fn register(&mut self, domain: DomainId, region: Region, access: Access) -> Result<MemoryKey, Error>;

    /// Takes the region back from the peer, at once.
    fn deregister(&mut self, key: MemoryKey) -> Result<(), Error>;

    /// The passive end: whoever dials this offer and presents this secret in time becomes this queue pair.
    fn expect(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error>;

    /// The active end: its queue pair, and the answer to the offer.
    fn dial(
        &mut self,
        domain: DomainId,
        vni: u32,
        secret: Secret,
        offer: &Endpoint,
        now: Instant,
    ) -> Result<(QpId, Endpoint), Error>;

    /// The passive end again: the answer to its offer has come. A fabric that needs none has connected without.
    fn accept(&mut self, qp: QpId, answer: &Endpoint) -> Result<(), Error>;

    /// Gives a queue pair up. Outstanding work is flushed, [`Disconnect::Closed`] follows.
    fn close(&mut self, qp: QpId);

    /// Posts a message, copied from `gather` before this returns.
    fn post_send(
        &mut self,
        qp: QpId,
        work: WorkId,
        gather: &[&[u8]],
        signal: Signal,
    ) -> Result<(), PostError>;

    /// Posts a write from a region of ours into one of the peer's. The local bytes are read some time before the
    /// completion, so they must not change until then.
    fn post_write(
        &mut self,
        qp: QpId,
        work: WorkId,
        local: LocalRange,
        remote: RemoteAddress,
        signal: Signal,
    ) -> Result<(), PostError>;

    /// Starts what was posted since the last time. One system call per queue pair, not per message.
    fn flush(&mut self);

    /// The next event, doing what I/O it takes; `None` when there is nothing more to do now.
    fn poll(&mut self) -> Option<Event<'_>>;

    /// Before a sleep: the descriptor is to become readable for whatever happens from here on. What has happened before
    /// is told by [`poll`](Self::poll), which is to be asked until `None` once more. In most fabrics it always is so.
    fn rest(&mut self) {}

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called; `None` while nothing is being set up.
    fn next_deadline(&self) -> Option<Instant>;

    /// Ends what was not ready by `now`; events tell.
    fn handle_timeout(&mut self, now: Instant);
}
