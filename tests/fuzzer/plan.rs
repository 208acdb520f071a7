//! What a sequence consists of, and how a seed becomes one.
//!
//! Any part of a plan is a plan: what a step needs and does not find, it skips, and says so. So a plan can be shrunk by
//! leaving steps out, and is named by its seed and the steps that are kept.

use libc::c_int;

/// SplitMix64.
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x6a09_e667_f3bc_c909)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// Each bit with equal chances.
    fn some_of(&mut self, bits: &[c_int]) -> c_int {
        bits.iter().filter(|_| self.once_in(2)).fold(0, |all, bit| all | bit)
    }
}

/// Where in a connection's life a sequence begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Right after the handshake.
    Fresh,
    /// While it is being upgraded.
    Across,
    /// On the lane.
    Lane,
}

/// Who makes a call.
pub const MAIN: usize = 0;
/// The side's second thread.
pub const THREAD: usize = 1;
/// The first of its two children.
pub const CHILD: usize = 2;
/// All that may be.
pub const ACTORS: usize = 4;
/// Numbers of duplicates begin here.
pub const NUMBERS: c_int = 700;
/// Descriptors of the connection that an actor may hold.
pub const SLOTS: usize = 3;

/// A call, or something else that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// One of [`super::moving::SEND`].
    Send { how: usize, slot: usize, n: usize, flags: c_int },
    /// One of [`super::moving::RECEIVE`].
    Receive { how: usize, slot: usize, n: usize, flags: c_int },
    /// The side waits for what the other sends after so many microseconds (nothing: it shuts).
    Meet { wait: Wait, slot: usize, n: usize, delay: u64, sends: usize },
    /// poll, ppoll, select or pselect, without waiting.
    Look { how: usize, slot: usize, events: i16 },
    /// FIONREAD.
    Unread { slot: usize },
    /// SO_ERROR.
    Error { slot: usize },
    /// getpeername succeeds.
    Peer { slot: usize },
    /// shutdown.
    Shutdown { slot: usize, how: c_int },
    /// close.
    Close { slot: usize },
    /// close with SO_LINGER 0.
    Reset { slot: usize },
    /// A new number for the connection: dup, fcntl, dup2, dup3; the latter two in the place of what `to` holds.
    Duplicate { how: usize, slot: usize, to: usize },
    /// O_NONBLOCK, by fcntl or FIONBIO.
    Mode { how: usize, slot: usize, nonblocking: bool },
    /// SO_RCVTIMEO.
    Timeout { slot: usize, on: bool },
    /// SO_LINGER with some seconds.
    Linger { slot: usize, on: bool },
    /// TCP_CORK, until the turn ends.
    Cork { slot: usize },
    /// A new epoll set in the place of the one before.
    Set,
    /// epoll_ctl: add, mod, del.
    Control { op: c_int, slot: usize, events: u32 },
    /// epoll_wait or epoll_pwait, without waiting.
    Events { how: usize, room: usize },
    /// A thread or a child, which inherits.
    Spawn { actor: usize },
    /// It ends, the child by a signal.
    End { actor: usize, killed: bool },
    /// The near guest is drained of lanes, or may have them again.
    Drain { on: bool },
}

/// How a side waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// One of the receiving calls, which begins before there is anything.
    Receive(usize),
    /// poll or select for input.
    Look(usize),
    /// epoll_wait on the set.
    Events,
}

/// A step of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Its place in the whole plan.
    pub at: usize,
    /// Which side makes it: 0 near, 1 far.
    pub side: usize,
    /// Who there.
    pub actor: usize,
    /// What.
    pub call: Call,
}

/// A sequence.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it begins.
    pub moment: Moment,
    /// What finds nobody is sent as well. On a fabric lane the sender hears of that later than from the kernel.
    pub orphans: bool,
    /// What happens.
    pub steps: Vec<Step>,
}

/// The name of a plan: its seed, and the steps that are kept if not all are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Name {
    /// The seed. The odd ones have threads.
    pub seed: u64,
    /// Steps that are kept.
    pub kept: Option<Vec<usize>>,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.seed)?;
        let Some(kept) = &self.kept else { return Ok(()) };
        let list: Vec<String> = kept.iter().map(usize::to_string).collect();
        write!(f, ":{}", list.join(","))
    }
}

impl std::str::FromStr for Name {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (seed, list) = text.split_once(':').map_or((text, None), |(seed, list)| (seed, Some(list)));
        let numbers = |list: &str| list.split(',').filter(|n| !n.is_empty()).map(str::parse).collect();
        Ok(Self { seed: seed.parse()?, kept: list.map(numbers).transpose()? })
    }
}

impl Name {
    /// All of a seed's steps.
    pub fn whole(seed: u64) -> Self {
        Self { seed, kept: None }
    }

    /// Whether its sides have more than one thread, which the library treats otherwise.
    pub fn is_threaded(&self) -> bool {
        self.seed % 2 == 1
    }

    /// The plan.
    pub fn plan(&self) -> Plan {
        let mut plan = Maker::new(self).plan();
        if plan.moment != Moment::Lane {
            // Nobody knows of which edges the kernel had told when a connection comes to its lane: they are told again.
            for step in &mut plan.steps {
                if let Call::Control { events, .. } = &mut step.call {
                    *events &= !(libc::EPOLLET as u32);
                }
            }
        }
        if let Some(kept) = &self.kept {
            plan.steps.retain(|step| kept.contains(&step.at));
        }
        plan
    }
}

/// What sequences of a kind have.
struct Maker {
    random: Random,
    threaded: bool,
    duplicates: bool,
    sets: bool,
    children: bool,
    drains: bool,
    length: usize,
}

const SIZES: [usize; 12] = [0, 1, 1, 2, 3, 7, 16, 100, 700, 1438, 1439, 5000];
const RECEIVED: [c_int; 4] = [libc::MSG_PEEK, libc::MSG_WAITALL, libc::MSG_DONTWAIT, libc::MSG_TRUNC];
const SENT: [c_int; 3] = [libc::MSG_DONTWAIT, libc::MSG_MORE, libc::MSG_EOR];
/// Once in a while; the first two find nothing, as nobody sends urgent bytes or asks for errors.
const RECEIVED_RARELY: [c_int; 3] = [libc::MSG_OOB, libc::MSG_ERRQUEUE, libc::MSG_CMSG_CLOEXEC];
const SENT_RARELY: [c_int; 3] = [libc::MSG_CONFIRM, libc::MSG_ZEROCOPY, libc::MSG_DONTROUTE];
const POLLED: [c_int; 7] = [
    libc::POLLIN as c_int,
    libc::POLLOUT as c_int,
    libc::POLLRDHUP as c_int,
    libc::POLLPRI as c_int,
    libc::POLLRDNORM as c_int,
    libc::POLLWRNORM as c_int,
    libc::POLLRDBAND as c_int,
];
const WATCHED: [c_int; 6] =
    [libc::EPOLLIN, libc::EPOLLIN, libc::EPOLLOUT, libc::EPOLLRDHUP, libc::EPOLLET, libc::EPOLLONESHOT];

impl Maker {
    fn new(name: &Name) -> Self {
        let mut random = Random::new(name.seed);
        let sets = random.once_in(2);
        Self {
            threaded: name.is_threaded(),
            sets,
            // A duplicate keeps a closed number in its sets.
            duplicates: !sets,
            children: random.once_in(4),
            drains: random.once_in(3),
            length: [10, 40, 100, 200][random.below(4) as usize] + random.below(30) as usize,
            random,
        }
    }

    fn plan(mut self) -> Plan {
        let moment = self.random.of(&[Moment::Fresh, Moment::Across, Moment::Lane, Moment::Lane]);
        let orphans = self.random.once_in(4);
        let (mut side, mut steps) = (0, Vec::with_capacity(self.length));
        // Who exists on each side, as far as the plan knows.
        let mut actors = [[true, false, false, false]; 2];
        for at in 0..self.length {
            if self.random.once_in(3) {
                side = 1 - side;
            }
            let late = at * 10 >= self.length * 7;
            let call = self.call(late, &mut actors[side]);
            let mut actor = self.random.below(ACTORS as u64 * 2) as usize;
            let everywhere =
                matches!(call, Call::Set | Call::Spawn { .. } | Call::End { .. } | Call::Drain { .. });
            if actor >= ACTORS || !actors[side][actor] || everywhere {
                actor = MAIN;
            }
            steps.push(Step { at, side, actor, call });
        }
        Plan { moment, orphans, steps }
    }

    fn size(&mut self) -> usize {
        match self.random.below(8) {
            0 => 1 + self.random.below(20_000) as usize,
            1 | 2 => 1 + self.random.below(300) as usize,
            _ => self.random.of(&SIZES),
        }
    }

    fn slot(&mut self) -> usize {
        if self.duplicates { self.random.below(SLOTS as u64 * 2) as usize % SLOTS } else { 0 }
    }

    fn call(&mut self, late: bool, actors: &mut [bool; ACTORS]) -> Call {
        let slot = self.slot();
        match self.random.below(100) {
            0..24 => {
                let flags = self.flags(&SENT, &SENT_RARELY);
                let how = self.random.below(super::moving::SEND.len() as u64) as usize;
                Call::Send { how, slot, n: self.size(), flags }
            }
            24..48 => {
                let flags = self.flags(&RECEIVED, &RECEIVED_RARELY);
                let how = self.random.below(super::moving::RECEIVE.len() as u64) as usize;
                Call::Receive { how, slot, n: self.size(), flags }
            }
            48..54 => self.meet(slot),
            54..62 => {
                let events = self.random.some_of(&POLLED) as i16;
                Call::Look { how: self.random.below(4) as usize, slot, events }
            }
            62..66 => Call::Unread { slot },
            66 => Call::Error { slot },
            67 => Call::Peer { slot },
            68 | 69 => {
                Call::Mode { how: self.random.below(2) as usize, slot, nonblocking: self.random.once_in(2) }
            }
            70 => Call::Timeout { slot, on: self.random.once_in(2) },
            71 => Call::Linger { slot, on: self.random.once_in(2) },
            72 => Call::Cork { slot },
            73..86 => self.watch(slot),
            86..90 => self.spawn(actors),
            90 | 91 if self.drains => Call::Drain { on: self.random.once_in(2) },
            92.. if late => self.end(slot),
            _ => Call::Unread { slot },
        }
    }

    fn flags(&mut self, often: &[c_int], rarely: &[c_int]) -> c_int {
        match self.random.below(16) {
            0..8 => 0,
            8..15 => self.random.some_of(often),
            _ => self.random.some_of(often) | self.random.some_of(rarely),
        }
    }

    fn meet(&mut self, slot: usize) -> Call {
        let wait = match self.random.below(4) {
            0 => Wait::Look(self.random.below(4) as usize),
            1 if self.sets => Wait::Events,
            _ => Wait::Receive(self.random.below(super::moving::RECEIVE.len() as u64) as usize),
        };
        let sends = if self.random.once_in(8) { 0 } else { 1 + self.random.below(1000) as usize };
        let delay = self.random.of(&[0, 0, 5, 30, 100, 400]);
        Call::Meet { wait, slot, n: self.size().max(1), delay, sends }
    }

    fn watch(&mut self, slot: usize) -> Call {
        if !self.sets {
            let to = 1 + self.random.below(SLOTS as u64 - 1) as usize;
            return match self.random.below(3) {
                0 => Call::Duplicate { how: self.random.below(4) as usize, slot, to },
                1 => Call::Close { slot: to },
                _ => Call::Unread { slot },
            };
        }
        match self.random.below(10) {
            0 => Call::Set,
            1..5 => Call::Control {
                op: self.random.of(&[
                    libc::EPOLL_CTL_ADD,
                    libc::EPOLL_CTL_ADD,
                    libc::EPOLL_CTL_MOD,
                    libc::EPOLL_CTL_DEL,
                ]),
                slot: 0,
                events: self.random.some_of(&WATCHED) as u32,
            },
            _ => Call::Events { how: self.random.below(2) as usize, room: self.random.of(&[1, 4]) },
        }
    }

    fn spawn(&mut self, actors: &mut [bool; ACTORS]) -> Call {
        let actor = 1 + self.random.below(ACTORS as u64 - 1) as usize;
        let may = if actor == THREAD { self.threaded } else { self.children };
        if !may {
            return Call::Unread { slot: 0 };
        }
        actors[actor] = !actors[actor];
        if actors[actor] {
            Call::Spawn { actor }
        } else {
            Call::End { actor, killed: self.random.once_in(3) }
        }
    }

    fn end(&mut self, slot: usize) -> Call {
        match self.random.below(8) {
            0..4 => Call::Shutdown { slot, how: self.random.below(3) as c_int },
            4..7 => Call::Close { slot },
            _ => Call::Reset { slot },
        }
    }
}
