//! Control messages: raw images of fixed size, and the enum they validate into.
//!
//! One protocol serves all neighbours: program ↔ agent, agent ↔ backend, a VM's front ↔ backend, and an operator's tool ↔
//! daemon. Each
//! message is one [`MESSAGE_LEN`]-byte datagram on a SEQPACKET socket; descriptors travel beside it by `SCM_RIGHTS`, in
//! the order that the variant's documentation names. Integers are little-endian.
//!
//! ```text
//! 0  magic "VSK\0"   4  version u16   6  kind u16   8  body …   (the rest is zero)
//! ```

use crate::Side;
use crate::layout::Geometry;
use crate::reason::Reason;
use core::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Bytes of every message.
pub const MESSAGE_LEN: usize = 128;
/// Version of the protocol: both ends must speak the same.
pub const VERSION: u16 = 1;
/// Most descriptors beside one message.
pub const MAX_FDS: usize = 2 + 2 * crate::layout::BELLS;
const MAGIC: [u8; 4] = *b"VSK\0";

/// Why a message was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// Not [`MESSAGE_LEN`] bytes, but this many.
    Length(usize),
    /// Not our magic.
    Magic,
    /// A version that is not [`VERSION`].
    Version(u16),
    /// A kind that is not known.
    Kind(u16),
    /// A field of this kind has a value that cannot be.
    Field(u16),
}

impl core::fmt::Display for Malformed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Length(n) => write!(f, "control message of {n} bytes, want {MESSAGE_LEN}"),
            Self::Magic => write!(f, "control message without our magic"),
            Self::Version(v) => write!(f, "control message of version {v}, want {VERSION}"),
            Self::Kind(k) => write!(f, "control message of unknown kind {k}"),
            Self::Field(k) => write!(f, "control message of kind {k} with an impossible field"),
        }
    }
}

impl core::error::Error for Malformed {}

impl Malformed {
    /// Its name, as the counters show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Length(_) => "message-length",
            Self::Magic => "message-magic",
            Self::Version(_) => "message-version",
            Self::Kind(_) => "message-kind",
            Self::Field(_) => "message-field",
        }
    }
}

/// A connection's addresses, seen from its owner. IPv4-mapped IPv6 addresses are IPv4 here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tuple {
    /// The owner's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

impl Tuple {
    /// A tuple with mapped addresses unmapped and flow labels and scopes dropped.
    pub fn new(local: SocketAddr, remote: SocketAddr) -> Self {
        let plain = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Self { local: plain(local), remote: plain(remote) }
    }

    /// The same connection seen from the other end.
    #[must_use]
    pub fn mirrored(self) -> Self {
        Self { local: self.remote, remote: self.local }
    }
}

/// What carries a direction's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Lane {
    /// Kernel TCP, the anchor itself.
    Tcp,
    /// A ring shared by two endpoints.
    Direct,
    /// Ring, backend, fabric, backend, ring.
    Fabric,
}

impl Lane {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Direct => "direct",
            Self::Fabric => "fabric",
        }
    }

    /// Its number, as messages and records carry it.
    pub fn code(self) -> u8 {
        match self {
            Self::Tcp => 0,
            Self::Direct => 1,
            Self::Fabric => 2,
        }
    }

    /// The lane with this number.
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Tcp),
            1 => Some(Self::Direct),
            2 => Some(Self::Fabric),
            _ => None,
        }
    }
}

/// A segment for one generation of a connection, and who the receiver of the message is in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Segment {
    /// The slab's number, unique in the life of the backend named by `boot`.
    pub slab: u64,
    /// Number of the segment in the slab.
    pub index: u32,
    /// The slab's sizes.
    pub geometry: Geometry,
    /// The side of the message's receiver.
    pub side: Side,
    /// `Direct` or `Fabric`.
    pub lane: Lane,
}

/// Most regions of a guest's memory: what vhost-user can hand over at a time.
pub const MAX_REGIONS: u32 = 32;

/// A region of a guest's memory: whole pages, which wrap round nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Region {
    /// Which one of its table, from 0.
    pub index: u32,
    /// How many the table has.
    pub count: u32,
    /// Where it begins for the guest.
    pub address: u64,
    /// Its bytes.
    pub size: u64,
    /// Where it begins in its descriptor.
    pub offset: u64,
}

impl Region {
    /// Whether it can be.
    pub fn is_valid(&self) -> bool {
        let Self { index, count, address, size, offset } = *self;
        let ends = |from: u64| from.checked_add(size).is_some_and(|end| i64::try_from(end).is_ok());
        let whole = |n: u64| n.is_multiple_of(4096);
        index < count
            && count <= MAX_REGIONS
            && size > 0
            && [address, size, offset].into_iter().all(whole)
            && ends(address)
            && ends(offset)
    }
}

/// Fields in their order in a body.
struct Writer<'a>(&'a mut [u8]);
struct Reader<'a>(&'a [u8]);

trait Field: Sized {
    fn put(&self, out: &mut Writer<'_>);
    fn take(from: &mut Reader<'_>) -> Option<Self>;
}

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        let (head, rest) = core::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = rest;
    }
}

impl<'a> Reader<'a> {
    fn bytes<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(head)
    }
}

macro_rules! integer_fields {
    ($($t:ty),*) => { $(impl Field for $t {
        fn put(&self, out: &mut Writer<'_>) { out.bytes(&self.to_le_bytes()); }
        fn take(from: &mut Reader<'_>) -> Option<Self> { Some(Self::from_le_bytes(*from.bytes()?)) }
    })* };
}
integer_fields!(u8, u16, u32, u64);

impl Field for bool {
    fn put(&self, out: &mut Writer<'_>) {
        u8::from(*self).put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        match u8::take(from)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

impl Field for Reason {
    fn put(&self, out: &mut Writer<'_>) {
        (*self as u16).put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        Self::from_code(u16::take(from)?)
    }
}

impl Field for SocketAddr {
    fn put(&self, out: &mut Writer<'_>) {
        let (family, ip) = match self.ip() {
            IpAddr::V4(v4) => (4u8, v4.to_ipv6_mapped()),
            IpAddr::V6(v6) => (6, v6),
        };
        family.put(out);
        out.bytes(&ip.octets());
        self.port().put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let family = u8::take(from)?;
        let ip = Ipv6Addr::from(*from.bytes::<16>()?);
        let port = u16::take(from)?;
        let ip = match family {
            4 => IpAddr::V4(ip.to_ipv4_mapped()?),
            6 if ip.to_ipv4_mapped().is_none() => IpAddr::V6(ip),
            _ => return None,
        };
        Some(Self::new(ip, port))
    }
}

impl Field for Tuple {
    fn put(&self, out: &mut Writer<'_>) {
        self.local.put(out);
        self.remote.put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let (local, remote) = (SocketAddr::take(from)?, SocketAddr::take(from)?);
        (local.is_ipv4() == remote.is_ipv4()).then_some(Self { local, remote })
    }
}

impl Field for Segment {
    fn put(&self, out: &mut Writer<'_>) {
        self.slab.put(out);
        self.index.put(out);
        self.geometry.segments().put(out);
        (self.geometry.ring_len() as u64).put(out);
        (self.side.index() as u8).put(out);
        self.lane.code().put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let (slab, index) = (u64::take(from)?, u32::take(from)?);
        let geometry = Geometry::new(u32::take(from)?, u64::take(from)?)?;
        let side = Side::from_index(u8::take(from)?)?;
        let lane = Lane::from_code(u8::take(from)?).filter(|l| *l != Lane::Tcp)?;
        geometry.segment_offset(index)?;
        Some(Self { slab, index, geometry, side, lane })
    }
}

impl Field for Region {
    fn put(&self, out: &mut Writer<'_>) {
        self.index.put(out);
        self.count.put(out);
        self.address.put(out);
        self.size.put(out);
        self.offset.put(out);
    }
    fn take(from: &mut Reader<'_>) -> Option<Self> {
        let (index, count) = (u32::take(from)?, u32::take(from)?);
        let (address, size, offset) = (u64::take(from)?, u64::take(from)?, u64::take(from)?);
        Some(Self { index, count, address, size, offset }).filter(Self::is_valid)
    }
}

macro_rules! messages {
    ($($(#[doc = $doc:literal])+ $variant:ident = $kind:literal { $($(#[doc = $fdoc:literal])+ $field:ident: $t:ty,)* })*) => {
        /// A control message, validated.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Message { $($(#[doc = $doc])+ $variant { $($(#[doc = $fdoc])+ $field: $t,)* },)* }

        impl Message {
            /// The message's image.
            pub fn encode(&self) -> [u8; MESSAGE_LEN] {
                let mut image = [0; MESSAGE_LEN];
                let mut out = Writer(&mut image);
                out.bytes(&MAGIC);
                VERSION.put(&mut out);
                match self { $(Self::$variant { $($field,)* } => {
                    ($kind as u16).put(&mut out);
                    $($field.put(&mut out);)*
                })* }
                image
            }

            /// What an image says.
            ///
            /// # Errors
            ///
            /// [`Malformed`], by its first fault.
            pub fn decode(image: &[u8]) -> Result<Self, Malformed> {
                let image: &[u8; MESSAGE_LEN] = image.try_into().map_err(|_| Malformed::Length(image.len()))?;
                let mut from = Reader(image);
                if from.bytes() != Some(&MAGIC) { return Err(Malformed::Magic); }
                let (Some(version), Some(kind)) = (u16::take(&mut from), u16::take(&mut from)) else {
                    return Err(Malformed::Length(image.len()));
                };
                if version != VERSION { return Err(Malformed::Version(version)); }
                match kind {
                    $($kind => {
                        $(let $field = <$t>::take(&mut from).ok_or(Malformed::Field(kind))?;)*
                        Ok(Self::$variant { $($field,)* })
                    })*
                    other => Err(Malformed::Kind(other)),
                }
            }
        }

        #[cfg(all(test, not(loom)))]
        const KINDS: &[u16] = &[$($kind,)*];
    };
}

messages! {
    /// Agent → backend, first. The backend answers `Welcome`.
    Hello = 1 {
        /// The agent's process, for the log.
        pid: u32,
    }
    /// Backend → agent, first; beside it a pidfd of the backend, which alone tells when it is really dead.
    Welcome = 2 {
        /// The vport's VXLAN network identifier.
        vni: u32,
        /// A number drawn at the backend's start: slab numbers count anew with another one.
        boot: u64,
    }
    /// Agent → backend: a connection has proved worth it. Answered by `Declined`, by `Prepare`, or not at all.
    Open = 3 {
        /// The agent's number for the connection, until `Close`.
        conn: u64,
        /// The program, by the agent's number: slabs are not shared between programs.
        program: u64,
        /// The kernel socket's addresses.
        tuple: Tuple,
        /// The smallest generation that this end accepts.
        min_generation: u32,
    }
    /// Backend → agent → program: it stays on TCP for now. `PeerNotOpen` and `PeerHostDown` may still change.
    Declined = 4 {
        /// Which connection: the agent's number, or the program's record.
        conn: u64,
        /// Why.
        reason: Reason,
    }
    /// Backend → agent → program: get ready for a generation. Beside it: slab memfd, the receiver's own bells, the far
    /// side's bells. The program maps, checks its socket and answers `Prepared` or `Refused`.
    Prepare = 5 {
        /// Which connection: the agent's number, or the program's record.
        conn: u64,
        /// The generation.
        generation: u32,
        /// Its memory.
        segment: Segment,
    }
    /// Program → agent → backend: ready to receive in this generation.
    Prepared = 6 {
        /// Which connection.
        conn: u64,
        /// The generation.
        generation: u32,
    }
    /// Program → agent → backend: not ready.
    Refused = 7 {
        /// Which connection.
        conn: u64,
        /// The generation.
        generation: u32,
        /// Why.
        reason: Reason,
    }
    /// Backend → agent: both ends are prepared; the sender may switch.
    Commit = 8 {
        /// Which connection.
        conn: u64,
        /// The generation.
        generation: u32,
    }
    /// Backend → agent: leave this generation. With `conn` 0: leave every lane.
    Withdraw = 9 {
        /// Which connection, or 0.
        conn: u64,
        /// The generation.
        generation: u32,
        /// Why.
        reason: Reason,
    }
    /// Program → agent → backend: neither direction of this end uses the generation any more.
    Left = 10 {
        /// Which connection.
        conn: u64,
        /// The generation.
        generation: u32,
    }
    /// Agent → backend: the connection has ended.
    Close = 11 {
        /// Which connection.
        conn: u64,
    }
    /// Agent → backend, only while bytes are unacknowledged.
    Ping = 12 {
        /// Returned in the answer.
        n: u64,
    }
    /// Backend → agent.
    Pong = 13 {
        /// The question's number.
        n: u64,
    }
    /// Program → agent, first. The agent answers `Attached`.
    Attach = 20 {
        /// The program's process.
        pid: u32,
        /// 0, or the number of the program whose connections this process is about to inherit by fork.
        inherit: u64,
    }
    /// Agent → program; beside it the memfd with the program's records, and the agent's bell (an eventfd).
    Attached = 21 {
        /// The agent's number for the program.
        program: u64,
        /// How many records the memfd holds.
        records: u32,
        /// Upgrade threshold in bytes moved either way.
        threshold_bytes: u64,
        /// Upgrade threshold in round trips.
        threshold_rounds: u32,
    }
    /// Program → agent: open a connection; beside it a duplicate of its descriptor. Answered by `Tracked` or `Declined`
    /// (with `handle` as the connection).
    Track = 22 {
        /// The program's number for it, returned in the answer.
        handle: u64,
        /// Application bytes sent so far.
        tx: u64,
        /// Application bytes received so far.
        rx: u64,
        /// This end did the `connect`: the kernel counts its SYN as a byte acknowledged.
        connector: bool,
    }
    /// Agent → program: the connection has a record.
    Tracked = 23 {
        /// As in `Track`.
        handle: u64,
        /// Which record.
        record: u32,
    }
    /// Program → agent: the program has closed its last descriptor of the connection; what is left is the agent's.
    Closed = 24 {
        /// Which record.
        record: u32,
    }
    /// Agent → program: records have changed; look again.
    Nudge = 25 {
        /// Which record.
        record: u32,
    }
    /// Program → agent: this direction was shut for writing; end it when what is under way has arrived.
    Shut = 26 {
        /// Which record.
        record: u32,
    }
    /// Tool → daemon: what a person asks; answered by `Reply`.
    Query = 30 {
        /// 0: totals, 1: connections.
        what: u32,
    }
    /// Daemon → tool; beside it a memfd with the answer, JSON or an error's text.
    Reply = 31 {
        /// Bytes of the answer.
        len: u64,
        /// Whether it was done.
        ok: bool,
    }
    /// Tool → backend: move a vport's connections to TCP and keep them there, or let them return; answered by `Reply`.
    Drain = 32 {
        /// The vport's number, in the order of the configuration (`Query` 0 lists them).
        vport: u32,
        /// Drain, or end the drain.
        on: bool,
    }
    /// Tool → backend: copy the segments that match to a queue, until this connection ends. Answered by `Captured`, or by
    /// `Reply` with why not.
    Capture = 33 {
        /// The vport's number, or `u32::MAX` for all.
        vport: u32,
        /// The tenant network, or `u32::MAX` for all.
        vni: u32,
        /// The guest's end; an unspecified address or port 0 stands for all.
        local: SocketAddr,
        /// The far end, likewise.
        remote: SocketAddr,
        /// Bytes of each segment to keep, header included.
        snaplen: u32,
        /// Bytes of the queue, a power of two.
        queue: u64,
    }
    /// Backend → tool; beside it the queue's memory, a slab of one segment whose ring from side 1 holds records, and the
    /// eventfd of bell 0 of side 0.
    Captured = 34 {
        /// Bytes of the queue.
        queue: u64,
    }
    /// Tool → backend: end the capture; answered by `Reply` with its counters, behind the last record.
    CaptureEnd = 35 {}
    /// A VM's front → backend, first, on the vport's socket. The backend answers `FrontWelcome`, or hangs up.
    FrontHello = 40 {
        /// The front's process, for the log.
        pid: u32,
        /// The CID of the guest.
        cid: u64,
    }
    /// Backend → front, first; beside it a pidfd of the backend, which alone tells when it is really dead. Before that,
    /// nothing else is said in either direction.
    FrontWelcome = 41 {
        /// As in `Welcome`.
        boot: u64,
    }
    /// Front → backend: one region of the guest's memory; beside it the descriptor that it is a part of. A table is
    /// whole when all of its regions have come, in their order, and replaces the one before.
    FrontRegion = 42 {
        /// Which table: larger than all before, in the front's life.
        table: u64,
        /// The region.
        region: Region,
    }
    /// Front → backend: the guest has opened a stream; beside it the end of a UNIX stream socket pair, which ends as the
    /// guest's stream ends.
    FrontStream = 43 {
        /// The front's number for it, for the log.
        id: u64,
        /// The guest's port: below 1024, its opener was privileged in the guest, or in a container of it.
        guest_port: u32,
        /// The port that it was opened to.
        host_port: u32,
    }
    /// Front → backend: the guest has booted, for the first time or again, and runs. Its streams have ended, and what was said of its memory's contents is void;
    /// the table still holds.
    FrontReset = 44 {}
    /// Front → backend: the guest is gone, and its memory with it: the table is void.
    FrontGone = 45 {}
    /// Front → backend: the guest stands still. It may be about to be reset, and its memory to be another's, so the
    /// backend does not touch it from now on, and answers `FrontQuiet`; QEMU is kept waiting until then. `FrontResumed` or
    /// `FrontReset` follows when the guest goes on, or boots.
    FrontPaused = 46 {}
    /// Backend → front: nothing of the guest's memory will be touched.
    FrontQuiet = 47 {}
    /// Front → backend: the guest goes on where it stood.
    FrontResumed = 48 {}
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open() -> Message {
        Message::Open {
            conn: 7,
            program: 9,
            tuple: Tuple::new("[::ffff:192.0.2.1]:80".parse().unwrap(), "192.0.2.2:4000".parse().unwrap()),
            min_generation: 3,
        }
    }

    fn prepare() -> Message {
        let geometry = Geometry::new(16, 1 << 20).unwrap();
        let segment = Segment { slab: 5, index: 15, geometry, side: Side::One, lane: Lane::Fabric };
        Message::Prepare { conn: u64::MAX, generation: 1, segment }
    }

    #[test]
    fn every_kind_has_its_own_number() {
        assert!(KINDS.iter().enumerate().all(|(i, k)| !KINDS[i + 1..].contains(k)));
    }

    #[test]
    fn messages_round_trip() {
        let [local, remote] = ["[::]:0", "192.0.2.1:80"].map(|end| end.parse().unwrap());
        let capture =
            Message::Capture { vport: 3, vni: u32::MAX, local, remote, snaplen: 96, queue: 1 << 20 };
        let declined = Message::Declined { conn: 1, reason: Reason::Quota };
        let stream = Message::FrontStream { id: 1, guest_port: 1023, host_port: u32::MAX };
        for message in
            [open(), prepare(), declined, capture, Message::CaptureEnd {}, front(good_region()), stream]
        {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    fn good_region() -> Region {
        Region { index: 1, count: 2, address: 1 << 32, size: 1 << 30, offset: 3 << 30 }
    }

    fn front(region: Region) -> Message {
        Message::FrontRegion { table: 7, region }
    }

    #[test]
    fn regions_are_whole_pages_and_wrap_nowhere() {
        let bad = [
            Region { index: 2, ..good_region() },
            Region { count: MAX_REGIONS + 1, ..good_region() },
            Region { size: 0, ..good_region() },
            Region { size: !4095, ..good_region() },
            Region { address: 1 << 63, ..good_region() },
            Region { address: 1 << 11, ..good_region() },
            Region { offset: i64::MAX as u64 & !4095, ..good_region() },
        ];
        for region in bad {
            assert_eq!(Message::decode(&front(region).encode()), Err(Malformed::Field(42)), "{region:?}");
        }
    }

    #[test]
    fn each_fault_has_its_name() {
        let good = prepare().encode();
        assert_eq!(Message::decode(&good[1..]), Err(Malformed::Length(127)));
        let with = |at: usize, value: u8| {
            let mut image = good;
            image[at] = value;
            Message::decode(&image)
        };
        assert_eq!(with(0, 0), Err(Malformed::Magic));
        assert_eq!(with(4, 9), Err(Malformed::Version(9)));
        assert_eq!(with(6, 99), Err(Malformed::Kind(99)));
        let body = 8 + 12;
        assert_eq!(with(body + 8, 16), Err(Malformed::Field(5)), "a segment that the slab has not");
        assert_eq!(with(body + 16, 1), Err(Malformed::Field(5)), "a ring that is no power of two");
        assert_eq!(with(body + 24, 2), Err(Malformed::Field(5)), "a third side");
        assert_eq!(with(body + 25, 0), Err(Malformed::Field(5)), "a segment on tcp");
    }

    proptest! {
        #[test]
        fn any_image_is_an_answer(image in prop::collection::vec(any::<u8>(), MESSAGE_LEN), kind in 0u16..50) {
            let mut image = image;
            image[..4].copy_from_slice(&MAGIC);
            image[4..6].copy_from_slice(&VERSION.to_le_bytes());
            image[6..8].copy_from_slice(&kind.to_le_bytes());
            if let Ok(message) = Message::decode(&image) {
                prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
            }
        }
    }
}
