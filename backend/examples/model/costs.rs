//! What each stage takes, and who says so.

use std::fmt;

/// A stage. What it takes is in ns: per message, segment, turn or byte, as its row in [`ROWS`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Send,
    SendByte,
    Transfer,
    Look,
    Pump,
    PumpLarge,
    Post,
    OutByte,
    Turn,
    Flush,
    Idle,
    WireSmall,
    WireLarge,
    WireByte,
    Gap,
    Read,
    Poll,
    Hear,
    HearLarge,
    InByte,
    Recv,
    RecvByte,
    Client,
    Server,
    Bell,
    Wake,
    WakeNear,
    Switch,
}

/// How many there are.
pub const COUNT: usize = Stage::Switch as usize + 1;

/// What each takes, in the order of [`Stage`].
pub type Costs = [f64; COUNT];

/// Where a figure is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Measured on this machine, by the bench or program named.
    Ours(&'static str),
    /// Published, and found again when this was written: the number in the document's list.
    Published(u8),
    /// Published, quoted from notes or memory, and not found again: the number in the document's list.
    Quoted(u8),
    /// Nobody's figure.
    Assumed,
    /// Nothing of the kind is there.
    Absent,
}

impl Source {
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Ours(_))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(by) => write!(f, "`{by}`"),
            Self::Published(number) => write!(f, "[{number}]"),
            Self::Quoted(number) => write!(f, "[{number}], quoted"),
            Self::Assumed => f.write_str("assumed"),
            Self::Absent => f.write_str("–"),
        }
    }
}

/// A stage: its name, what it takes on the RNIC and by whom, what it takes over `soft` here and by whom.
pub type Row = (Stage, &'static str, f64, Source, f64, Source);

use Source::{Absent, Assumed, Ours, Published, Quoted};

const STAGES: Source = Ours("stages");
const CALLS: Source = Ours("calls");
const FABRIC: Source = Ours("fabric");

/// What 32 B took one way by ib_send_lat [1], and 4 KiB, less a byte's time on the wire for each.
const INLINE: f64 = 820.0;
const FETCHED: f64 = 2250.0 - 4096.0 * BYTE;
/// 96.6 Gbit/s of payload [2].
const BYTE: f64 = 8.0 / 96.6;
/// 13 million WRITEs a second from one processor [3].
const POST: f64 = 77.0;
/// A completion and a receive: as long as a post.
const POLL: f64 = POST;
/// One of a batch over `soft`, for either side.
const SOFT_MESSAGE: f64 = 78.0;
/// 31.0 Gbit/s between two processors, where both sides are at it all the time.
const SOFT_BYTE: f64 = 8.0 / 31.0;
/// The same with both sides in one thread, and all in its cache: by `stages`, sent and received.
pub const SOFT_BYTE_CACHED: [f64; 2] = [0.023, 0.034];

/// All of them, in the order of [`Stage`].
#[rustfmt::skip]
pub const ROWS: [Row; COUNT] = [
    (Stage::Send, "program: `send`, from hook to doorbell", 66.0, CALLS, 66.0, CALLS),
    (Stage::SendByte, "program: a byte into the ring", 0.032, CALLS, 0.032, CALLS),
    (Stage::Transfer, "two cache lines to another processor", 54.0, STAGES, 54.0, STAGES),
    (Stage::Look, "backend: a flow looked at", 10.0, STAGES, 10.0, STAGES),
    (Stage::Pump, "backend: a small segment, ring to message", 68.0, STAGES, 68.0, STAGES),
    (Stage::PumpLarge, "backend: the header of a large one", 44.0, STAGES, 44.0, STAGES),
    (Stage::Post, "backend: a work request posted", POST, Quoted(3), SOFT_MESSAGE, FABRIC),
    (Stage::OutByte, "backend: a byte that goes ahead", 0.0, Absent, SOFT_BYTE, FABRIC),
    (Stage::Turn, "backend: a turn's clock and empty poll", 26.0 + 40.0, STAGES, 26.0 + 113.0, STAGES),
    (Stage::Flush, "backend: what a turn has posted, handed over", 0.0, Absent, 3580.0 - SOFT_MESSAGE, STAGES),
    (Stage::Idle, "backend: `sched_yield` of an idle turn", 377.0, STAGES, 377.0, STAGES),
    (Stage::WireSmall, "wire: latency of what is sent inline", INLINE - POST - POLL, Published(1), 0.0, Absent),
    (Stage::WireLarge, "wire: latency of what is fetched", FETCHED - POST - POLL, Published(1), 0.0, Absent),
    (Stage::WireByte, "wire: a byte", BYTE, Published(2), 0.0, Absent),
    (Stage::Gap, "wire: from one message to the next", 5.0, Quoted(4), 0.0, Absent),
    (Stage::Read, "backend: what has arrived, read", 0.0, Absent, 3540.0 - SOFT_MESSAGE, STAGES),
    (Stage::Poll, "backend: a message taken, receive posted", POLL, Assumed, SOFT_MESSAGE, FABRIC),
    (Stage::Hear, "backend: a small segment, message to ring", 76.0, STAGES, 76.0, STAGES),
    (Stage::HearLarge, "backend: the header of one that went ahead", 138.0, STAGES, 138.0, STAGES),
    (Stage::InByte, "backend: a byte that arrives", 0.0, Absent, SOFT_BYTE, FABRIC),
    (Stage::Recv, "program: `recv`", 70.0, CALLS, 70.0, CALLS),
    (Stage::RecvByte, "program: a byte out of the ring", 0.031, CALLS, 0.031, CALLS),
    (Stage::Client, "program 0 itself", 0.0, Absent, 0.0, Absent),
    (Stage::Server, "program 1 itself", 0.0, Absent, 0.0, Absent),
    (Stage::Bell, "a doorbell rung", 176.0, STAGES, 176.0, STAGES),
    (Stage::Wake, "a backend that sleeps runs again", 5500.0, Quoted(3), 15_600.0, STAGES),
    (Stage::WakeNear, "a program that sleeps runs again", 5500.0, Quoted(3), 2_130.0, STAGES),
    (Stage::Switch, "another thread on the same processor", 0.0, Absent, 1063.0, STAGES),
];

const fn column(rnic: bool) -> Costs {
    let (mut costs, mut at) = ([0.0; COUNT], 0);
    while at < COUNT {
        assert!(ROWS[at].0 as usize == at);
        costs[at] = if rnic { ROWS[at].2 } else { ROWS[at].4 };
        at += 1;
    }
    costs
}

/// What the stages take on the RNIC.
pub const RNIC: Costs = column(true);
/// What they take here, over `soft`.
pub const SOFT: Costs = column(false);

/// What redis-server and redis-benchmark have to do per GET without `send` and `recv`, with so many connections: what is
/// left of a request's time on the `direct` lane, where nothing but these two is at work.
pub fn redis(connections: usize) -> f64 {
    let calls = RNIC[Stage::Send as usize] + RNIC[Stage::Recv as usize];
    if connections == 1 {
        // Each waits for the other, for half a round trip.
        return 1e9 / DIRECT[0] / 2.0 - RNIC[Stage::Transfer as usize] - calls;
    }
    // Each has all the time of its processor, or less.
    1e9 / DIRECT[1] - calls
}

/// Redis GET a second on the lane `direct`, with 1 and with 50 connections, by `scripts/demo`.
const DIRECT: [f64; 2] = [346_331.0, 978_728.0];

/// What can be measured here.
#[derive(Clone, Copy, Debug)]
pub enum Measure {
    /// Half a round trip of 64 B, µs, between programs that poll, or that sleep when they wait.
    OneWay(bool),
    /// One stream with writes of so many bytes through rings of so many, Gbit/s; a byte takes a backend as long as between
    /// two processors, or as long as in cache.
    Stream(usize, usize, bool),
    /// Redis GET with so many connections, in thousands a second.
    Redis(usize),
}

/// What was measured over `soft`: the median, and by what.
pub const MEASURED: [(&str, Measure, f64, &str); 8] = [
    ("64 B one way, programs that poll", Measure::OneWay(true), 9.97, "`lane`"),
    ("64 B one way, sockperf", Measure::OneWay(false), 23.3, "`scripts/demo`"),
    (
        "stream, rings of 1 MiB, bytes not in cache",
        Measure::Stream(128 << 10, 1 << 20, false),
        47.1,
        "`lane`",
    ),
    ("stream, rings of 1 MiB, bytes in cache", Measure::Stream(128 << 10, 1 << 20, true), 47.1, "`lane`"),
    (
        "stream, iperf3, bytes not in cache",
        Measure::Stream(128 << 10, 256 << 10, false),
        24.1,
        "`scripts/demo`",
    ),
    ("stream, iperf3, bytes in cache", Measure::Stream(128 << 10, 256 << 10, true), 24.1, "`scripts/demo`"),
    ("redis GET, 1 connection", Measure::Redis(1), 19.9, "`scripts/demo`"),
    ("redis GET, 50 connections", Measure::Redis(50), 167.3, "`scripts/demo`"),
];

/// What was published: vSocket's figure, and others'.
pub const PUBLISHED: [(&str, &str, &str); 5] = [
    (
        "round trip, 64 B",
        "7 µs",
        "SR-IOV with libvma 3 µs [5]; SocksDirect 1.7 µs [3]; RDMA WRITE alone 1.6 µs [3]",
    ),
    ("one stream", "41.7 Gbit/s", "SR-IOV with libvma 26.3 Gbit/s [5]; eRPC 75 Gbit/s [6]"),
    ("redis GET, 1 connection", "70 k/s", "SR-IOV with libvma 153 k/s [5]"),
    ("redis GET, 10 connections", "712 k/s", "SR-IOV with libvma 461 k/s [5]"),
    ("redis GET, 40 connections", "692 k/s", "–"),
];
