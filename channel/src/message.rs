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

use crate::layout::Geometry;
use crate::reason::Reason;
use core::net::SocketAddr;

mod parts;

use parts::{Field, Reader, Writer};
pub use parts::{Lane, MAX_REGIONS, RUNS, Region, Runs, Segment, Tuple};

/// Bytes of every message.
pub const MESSAGE_LEN: usize = 128;
/// Version of the protocol: both ends must speak the same.
pub const VERSION: u16 = 2;
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
    /// Backend → agent: leave this generation. With `conn` 0: leave every lane. Agent → backend: this end is about to
    /// leave it, and the other is to leave it too, for this reason.
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
    /// Agent → backend: a program has ended, and with it its connections: nobody maps its side of its slabs. That of a
    /// virtual machine ends its doorbells instead.
    Ended = 14 {
        /// The program.
        program: u64,
    }
    /// Program → agent, first. The agent answers `Attached`. Beside it, if an agent before had given this process alone its
    /// records: their memfd and the bell, to be taken over.
    Attach = 20 {
        /// The program's process.
        pid: u32,
        /// 0, or the number of the program whose connections this process is about to inherit by fork.
        inherit: u64,
    }
    /// Agent → program; beside it the memfd with the program's records, and the agent's bell (an eventfd): those that the
    /// program has brought, or new ones.
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
        /// It came from another process, which may hold it still. Declined with `HeldByOthers` if one does.
        found: bool,
    }
    /// Agent → program: the connection has a record.
    Tracked = 23 {
        /// As in `Track`.
        handle: u64,
        /// Which record.
        record: u32,
        /// What is said of the past holds: of one that was found it may not be known.
        known: bool,
        /// Of one that was found: the last generation that whoever had it has used.
        generation: u32,
        /// Of one that was found: how far its stream is ahead of what the kernel has counted, as bytes went by rings. What was
        /// sent, modulo 2⁶⁴, as frames count as well.
        ahead_tx: u64,
        /// The same of what was received.
        ahead_rx: u64,
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
    /// Whoever has the connection, whose descriptor is beside it → agent: from now on others are to find all of it in the
    /// kernel's socket, as a program that is executed, or a process that it is passed to. Answered by `Declined` (with
    /// `handle` as the connection) when it is on TCP, where it stays, or could not be brought there. No `Attach` is needed
    /// before.
    Parted = 27 {
        /// The sender's number for it, returned in the answer.
        handle: u64,
        /// Why: one that [`Reason::is_whole`].
        reason: Reason,
    }
    /// Program → agent that has taken its records over: this connection, whose descriptor is beside it, is on TCP both
    /// ways, and may be opened again.
    Resume = 28 {
        /// Which record.
        record: u32,
        /// The last generation that it has used.
        generation: u32,
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
    /// Backend → front: keep this until the guest boots again. Front → backend, behind `FrontWelcome`: what it was given to keep
    /// by a backend before, so that who has registered in this boot is known to every backend.
    FrontToken = 49 {
        /// A secret between the guest's keeper and the backends; not 0.
        token: u128,
    }
    /// Keeper → backend, first on the stream on which it registers, which it opens from a privileged port. Answered by
    /// `Registered`, or by the stream's end. The first of a boot is let in with any token; each later one must bring the token that the
    /// one before was given.
    Register = 50 {
        /// 0, or the token that it was given earlier.
        token: u128,
        /// The keeper's process in the guest, for the log.
        pid: u32,
    }
    /// Backend → keeper → agent. From here on no backend touches memory that was told of on earlier streams.
    Registered = 51 {
        /// What proves from now on who registers, and who presents itself.
        token: u128,
        /// As in `Welcome`.
        boot: u64,
    }
    /// Backend → keeper: make and pin memory for a slab, hand it to the agent (`SlabMade`), and then tell its pages
    /// (`SlabPages`), or say why not (`SlabRefused`).
    SlabWanted = 52 {
        /// The slab's number, unique under `boot`.
        slab: u64,
        /// The program that will map it, by the agent's number.
        program: u64,
        /// Its sizes.
        geometry: Geometry,
    }
    /// Keeper → backend: the next pages of a slab, pinned before their numbers were read. The slab is whole when as many have come
    /// as its geometry takes; the backend touches them from then on, until it says `SlabRelease`.
    SlabPages = 53 {
        /// Which slab.
        slab: u64,
        /// How many pages have come before.
        first: u32,
        /// These, of 4096 bytes.
        runs: Runs,
    }
    /// Keeper → backend: there is no memory for this slab; none of it is touched.
    SlabRefused = 54 {
        /// Which slab.
        slab: u64,
        /// Why.
        reason: Reason,
    }
    /// Backend → keeper → agent: the backend does not touch this slab's memory any more. It can be freed.
    SlabRelease = 55 {
        /// Which slab.
        slab: u64,
    }
    /// Keeper → agent; beside it the slab's memfd.
    SlabMade = 56 {
        /// Which slab.
        slab: u64,
        /// The program that will map it.
        program: u64,
        /// Its sizes.
        geometry: Geometry,
    }
    /// Agent → backend, first on each of its streams. On that of program 0 it goes on with `Hello`. Each of the others is the
    /// doorbell of a program: behind this message both ends write bytes to ring and read them for nothing. The backend rings bell
    /// n of the program's side on the stream of bell n, and the program rings the backend's on that of bell 0. The agent ends
    /// them when the program has ended.
    Present = 57 {
        /// As the keeper was given it.
        token: u128,
        /// The program, or 0.
        program: u64,
        /// Which doorbell.
        bell: u32,
    }
    /// Backend → agent: so many bytes lie in this doorbell, which programs wait for and never read, that it is to be read empty but for
    /// one byte.
    BellFull = 58 {
        /// The program.
        program: u64,
        /// Which doorbell.
        bell: u32,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Side;
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
        let geometry = Geometry::new(16, 4096).unwrap();
        let wanted = Message::SlabWanted { slab: 1, program: 2, geometry };
        let token = Message::Present { token: u128::MAX - 1, program: 3, bell: 3 };
        for message in [
            open(),
            prepare(),
            declined,
            capture,
            Message::CaptureEnd {},
            front(good_region()),
            stream,
            wanted,
            token,
        ] {
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
    fn pages_travel_as_runs() {
        let pages: Vec<u64> = (7..100).chain([200, 300, 301]).chain((0..20).map(|n| 1000 - 2 * n)).collect();
        let (runs, taken) = Runs::of(&pages).unwrap();
        assert_eq!(taken, 93 + 1 + 2 + 9);
        assert_eq!(runs.iter().take(3).collect::<Vec<_>>(), [(7, 93), (200, 1), (300, 2)]);
        let message = Message::SlabPages { slab: 1, first: 9, runs };
        assert_eq!(Message::decode(&message.encode()), Ok(message));
        let many: Vec<u64> = (1..70_000).collect();
        assert_eq!(Runs::of(&many).map(|(runs, taken)| (runs.iter().count(), taken)), Some((2, 69_999)));
        assert!(Runs::of(&[0]).is_none() && Runs::of(&[1 << 48]).is_none());
        for bad in [[0, 0], [5 << 16, 0], [1, 0], [0, 5 << 16 | 1]] {
            let mut image = message.encode();
            image[8 + 12..].fill(0);
            for (n, run) in bad.into_iter().enumerate() {
                image[20 + 8 * n..28 + 8 * n].copy_from_slice(&u64::to_le_bytes(run));
            }
            assert_eq!(Message::decode(&image), Err(Malformed::Field(53)), "{bad:?}");
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
        fn any_image_is_an_answer(image in prop::collection::vec(any::<u8>(), MESSAGE_LEN), kind in 0u16..60) {
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
