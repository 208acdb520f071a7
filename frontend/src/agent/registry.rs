//! Who is there: programs with their records, the processes that hold them, and their connections. Memory and tables;
//! what happens to them is decided elsewhere.

use super::course::{Course, Stage};
use super::ending::Ending;
use super::parting::{Given, Parting};
use crate::endpoint::Endpoint;
use crate::lane::Violation;
use crate::memory::{Bound, Records, Ringers, Slab};
use crate::post::{Parcel, Post};
use crate::record::{Past, RECORDS, Record, status};
use rustix::event::EventfdFlags;
use rustix::fd::{AsFd, OwnedFd};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vsocket_channel::message::{Lane, Message, Tuple};
use vsocket_channel::reason::Reason;

/// Slabs without a user that a program keeps mapped, as its next connection will probably want one.
const IDLE_SLABS: usize = 8;

/// A process of a program, or a tool: whoever has connected.
#[derive(Debug)]
pub struct Holder {
    /// Its control connection.
    pub post: Post,
    /// Its process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its program, once attached.
    pub program: Option<u64>,
}

/// A slab that a program's connections use, with what must be passed to further holders.
#[derive(Clone, Debug)]
pub struct MappedSlab {
    /// The mapping.
    pub slab: Arc<Slab>,
    /// The memfd, the program's own bells, and the far side's bells.
    pub parcel: Parcel,
    /// The far side's bells.
    pub far: Ringers,
}

/// A program: one set of records, and one or more processes that hold it.
#[derive(Debug)]
pub struct Program {
    /// Its process's name.
    pub name: String,
    /// The process that attached first.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its records.
    pub records: Records,
    /// The records' memfd and the watchdog's eventfd.
    pub fds: Arc<Vec<OwnedFd>>,
    /// Its living processes, oldest first.
    pub holders: Vec<u64>,
    /// Which connection a record belongs to.
    pub by_record: HashMap<u32, u64>,
    /// Slabs, by their host's boot and their number.
    pub slabs: HashMap<(u64, u64), MappedSlab>,
    /// Connections that could not be tracked, and why.
    pub declined: HashMap<Tuple, Reason>,
    /// Records that an agent before has given, of connections that are not ours so far.
    pub reserved: HashSet<u32>,
    free: VecDeque<u32>,
    fresh: u32,
}

impl Program {
    /// A program without connections.
    ///
    /// # Errors
    ///
    /// Out of memory or descriptors.
    pub fn new(pid: i32, uid: u32) -> io::Result<Self> {
        let (memfd, records) = Records::create()?;
        let watchdog = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self::with(pid, uid, records, vec![memfd, watchdog]))
    }

    /// A program that brings its records from an agent before, with the watchdog's bell.
    ///
    /// # Errors
    ///
    /// It is not the memory of records, or cannot be mapped.
    pub fn resumed(pid: i32, uid: u32, [memfd, watchdog]: [OwnedFd; 2]) -> io::Result<Self> {
        let records = Records::take_over(&memfd)?;
        let mut program = Self::with(pid, uid, records, vec![memfd, watchdog]);
        program.fresh = program.records.header().kept.load(Ordering::Acquire).min(RECORDS);
        let kept = |n: &u32| {
            let record = program.records.record(*n);
            record.is_some_and(|record| record.kept.load(Ordering::Relaxed) != 0)
        };
        let (reserved, free): (Vec<u32>, Vec<u32>) = (0..program.fresh).partition(kept);
        (program.reserved, program.free) = (reserved.into_iter().collect(), free.into());
        Ok(program)
    }

    fn with(pid: i32, uid: u32, records: Records, fds: Vec<OwnedFd>) -> Self {
        records.header().watchdog.store(1, Ordering::Release);
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        Self {
            name: name.map_or_else(|_| "?".to_owned(), |n| n.trim_end().to_owned()),
            pid,
            uid,
            records,
            fds: Arc::new(fds),
            holders: Vec::new(),
            by_record: HashMap::new(),
            slabs: HashMap::new(),
            declined: HashMap::new(),
            reserved: HashSet::new(),
            free: VecDeque::new(),
            fresh: 0,
        }
    }

    /// Whether its records are in this memory.
    pub fn is_in(&self, memory: &OwnedFd) -> bool {
        let name = |fd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        self.fds.first().is_some_and(|ours| name(ours) == name(memory))
    }

    /// The eventfd that wakes the watchdog.
    pub fn watchdog(&self) -> &OwnedFd {
        &self.fds[1]
    }

    /// A record that nobody uses.
    pub fn take_record(&mut self) -> Option<u32> {
        if let Some(used) = self.free.pop_front() {
            return Some(used);
        }
        let fresh = self.fresh;
        self.fresh += u32::from(fresh < RECORDS);
        (fresh < RECORDS).then_some(fresh)
    }

    /// Nobody uses this record any more. One that a message may still name (`late`) is used again last of all.
    pub fn release_record(&mut self, record: u32, late: bool) {
        self.by_record.remove(&record);
        if late {
            self.free.push_back(record);
        } else {
            self.free.push_front(record);
        }
    }

    fn sweep_slabs(&mut self) {
        let idle = |s: &MappedSlab| Arc::strong_count(&s.slab) == 1;
        let mut spare = self.slabs.values().filter(|s| idle(s)).count().saturating_sub(IDLE_SLABS);
        self.slabs.retain(|_, slab| {
            let drop = spare > 0 && idle(slab);
            spare -= usize::from(drop);
            !drop
        });
    }
}

/// A connection that has a record.
#[derive(Debug)]
pub struct Conn {
    /// Its program.
    pub program: u64,
    /// Its record.
    pub record: u32,
    /// The processes that have it open.
    pub holders: Vec<u64>,
    /// Its addresses.
    pub tuple: Tuple,
    /// The kernel's name for its socket.
    pub cookie: u64,
    /// What was agreed with the backend.
    pub course: Course,
    /// The agent's duplicate of the kernel socket, once it was prepared.
    pub anchor: Option<OwnedFd>,
    /// The segment of the last generation that the program prepared.
    pub bound: Option<Bound>,
    /// The segment that the program was asked to prepare, and whom of it.
    pub asked: Option<(Bound, u64)>,
    /// The program has shut it for writing, and not all is drained.
    pub shutting: bool,
    /// It has shut both directions, and the kernel socket is to be shut for reading when the far end's stay has ended.
    pub deaf: bool,
    /// What an ended stay left is not drained.
    pub draining: bool,
    /// The anchor is registered with the loop.
    pub watched: bool,
    /// The program has it no longer.
    pub ending: Option<Ending>,
    /// It is being brought to TCP for good.
    pub parting: Option<Parting>,
    /// It was: nothing of its end is ours.
    pub parted: bool,
    /// What its stays had left behind when it got its record, if that is known.
    pub past: Option<Past>,
    /// The first lane that it was on.
    pub first_lane: Option<Lane>,
    /// Reasons that were counted, a bit each.
    pub counted: u64,
}

/// Bytes sent and received.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct TxRx {
    /// Sent.
    pub tx: u64,
    /// Received.
    pub rx: u64,
}

/// Bytes per lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct LaneBytes {
    /// Kernel TCP.
    pub tcp: TxRx,
    /// Direct lanes.
    pub direct: TxRx,
    /// Fabric lanes.
    pub fabric: TxRx,
}

impl LaneBytes {
    /// Adds another's.
    pub fn add(&mut self, other: &Self) {
        for (sum, one) in [
            (&mut self.tcp, &other.tcp),
            (&mut self.direct, &other.direct),
            (&mut self.fabric, &other.fabric),
        ] {
            sum.tx += one.tx;
            sum.rx += one.rx;
        }
    }

    /// What a record says. Without its locks, which a stopped program may hold: read until two readings agree.
    pub fn of(record: &Record) -> Self {
        let read = || {
            let word = |w: &std::sync::atomic::AtomicU64| w.load(Ordering::Acquire);
            let one = |n: usize, off| {
                let (direct, fabric) = (word(&record.direct[n]), word(&record.fabric[n]));
                (word(off).saturating_sub(word(&record.others[n]) + direct + fabric), direct, fabric)
            };
            let (sent, got) = (one(0, &record.tx_off), one(1, &record.rx_off));
            let pair = |tx, rx| TxRx { tx, rx };
            Self { tcp: pair(sent.0, got.0), direct: pair(sent.1, got.1), fabric: pair(sent.2, got.2) }
        };
        let mut last = read();
        for _ in 0..16 {
            let next = read();
            if next == last {
                break;
            }
            last = next;
        }
        last
    }
}

/// Everybody, and the totals.
#[derive(Debug, Default)]
pub struct Registry {
    /// Whoever is connected.
    pub holders: HashMap<u64, Holder>,
    /// Programs, by the number that `Attached` told them.
    pub programs: HashMap<u64, Program>,
    /// Connections, by the number that the backend knows.
    pub conns: HashMap<u64, Conn>,
    /// Sockets that are tracked, by their cookie.
    pub cookies: HashMap<u64, u64>,
    /// Sockets that others may have.
    pub given: Given,
    /// Totals since start.
    pub totals: Totals,
    last: u64,
}

/// Totals since the agent's start.
#[derive(Debug, Default)]
pub struct Totals {
    /// Connections that have been on a lane.
    pub upgraded: u64,
    /// Of these, first on a direct lane.
    pub direct: u64,
    /// Of these, first on a fabric lane.
    pub fabric: u64,
    /// Reasons for TCP, once per connection and reason.
    pub declined: BTreeMap<&'static str, u64>,
    /// Messages that were refused or ignored.
    pub drops: BTreeMap<&'static str, u64>,
    /// Bytes of connections that have ended.
    pub bytes: LaneBytes,
}

impl Totals {
    /// Counts a message that was refused or ignored.
    pub fn drop(&mut self, what: &'static str) {
        *self.drops.entry(what).or_default() += 1;
    }

    /// Counts a reason for TCP.
    pub fn decline(&mut self, reason: Reason) {
        *self.declined.entry(reason.name()).or_default() += 1;
    }
}

impl Registry {
    /// A number that was not used before, for whatever is to have one.
    pub fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// A connection of a program, by its record.
    pub fn conn_of(&self, program: u64, record: u64) -> Option<u64> {
        let record = u32::try_from(record).ok()?;
        self.programs.get(&program)?.by_record.get(&record).copied()
    }

    /// A connection's record.
    pub fn record(&self, conn: &Conn) -> Option<&Record> {
        self.programs.get(&conn.program)?.records.record(conn.record)
    }

    /// A connection's endpoint, once the agent has a duplicate of its socket.
    pub fn endpoint(&self, conn: u64) -> Option<Endpoint<'_>> {
        let conn = self.conns.get(&conn)?;
        let anchor = conn.anchor.as_ref()?.as_fd();
        Some(Endpoint { record: self.record(conn)?, anchor, bound: conn.bound.as_ref(), watchdog: None })
    }

    /// Counts why a connection is on TCP, once for each reason.
    pub fn count_reason(&mut self, conn: u64) {
        let Some(conn) = self.conns.get_mut(&conn) else { return };
        let Some(reason) = conn.course.reason().filter(|r| *r != Reason::Opening) else { return };
        let bit = 1u64 << (reason as u16).min(63);
        if conn.counted & bit == 0 {
            conn.counted |= bit;
            self.totals.decline(reason);
        }
    }

    /// Counts a connection that is committed for the first time.
    pub fn count_upgrade(&mut self, conn: u64) {
        let Some(conn) = self.conns.get_mut(&conn).filter(|c| c.first_lane.is_none()) else { return };
        let lane = conn.course.lane();
        conn.first_lane = Some(lane);
        self.totals.upgraded += 1;
        match lane {
            Lane::Fabric => self.totals.fabric += 1,
            _ => self.totals.direct += 1,
        }
    }

    /// Sends a message to a holder. False: it is of no use any more.
    pub fn tell_holder(&mut self, holder: u64, message: Message, parcel: Parcel) -> bool {
        let Some(to) = self.holders.get_mut(&holder) else { return true };
        let sent = to.post.send(message, parcel);
        let program = to.program.and_then(|p| self.programs.get(&p));
        count_mail(program, sent.as_ref().copied().unwrap_or(0));
        sent.is_ok()
    }

    /// Sends a holder what waits. False: it is of no use any more.
    pub fn flush_holder(&mut self, holder: u64) -> bool {
        let Some(to) = self.holders.get_mut(&holder) else { return true };
        let sent = to.post.flush();
        let program = to.program.and_then(|p| self.programs.get(&p));
        count_mail(program, sent.as_ref().copied().unwrap_or(0));
        sent.is_ok()
    }

    /// Whether bytes on a fabric lane wait for their acknowledgement.
    pub fn unacknowledged(&self) -> bool {
        self.conns.values().any(|conn| {
            let fabric = matches!(conn.course.stage(), Stage::Committed { .. } | Stage::Leaving { .. })
                && conn.course.lane() == Lane::Fabric;
            let Some(bound) = conn.bound.as_ref().filter(|_| fabric) else { return false };
            let on_ring = self.record(conn).is_some_and(|r| r.is(status::TX_RING));
            on_ring && !all_held(bound)
        })
    }

    /// Arms every program's watchdog. To be followed by a fence and one more look.
    pub fn arm_watchdogs(&self) {
        for program in self.programs.values() {
            program.records.header().watchdog.store(1, Ordering::Release);
        }
    }

    /// Forgets a connection, whose record becomes free.
    pub fn remove(&mut self, id: u64) -> Option<Conn> {
        let conn = self.conns.remove(&id)?;
        self.cookies.remove(&conn.cookie);
        if let Some(record) = self.record(&conn) {
            let bytes = LaneBytes::of(record);
            let violation = Violation::from_code(record.violation.load(Ordering::Relaxed));
            record.ready.store(0, Ordering::Relaxed);
            self.totals.bytes.add(&bytes);
            if let Some(violation) = violation {
                self.totals.drop(violation.name());
            }
        }
        Some(conn)
    }

    /// Gives a forgotten connection's record back; the program goes too if this was the last thing of it.
    pub fn give_back(&mut self, program: u64, record: u32, late: bool) -> Option<Program> {
        let owner = self.programs.get_mut(&program)?;
        owner.release_record(record, late);
        owner.sweep_slabs();
        self.retire(program)
    }

    /// Removes a program that has neither processes nor connections.
    pub fn retire(&mut self, program: u64) -> Option<Program> {
        let owner = self.programs.get(&program)?;
        (owner.holders.is_empty() && owner.by_record.is_empty())
            .then(|| self.programs.remove(&program))
            .flatten()
    }
}

fn count_mail(program: Option<&Program>, sent: u32) {
    if let Some(program) = program.filter(|_| sent > 0) {
        program.records.header().mail.fetch_add(sent, Ordering::Release);
    }
}

/// Whether the far side holds everything that was put on the ring.
pub fn all_held(bound: &Bound) -> bool {
    let ring = bound.tx();
    ring.indices.head.head.load(Ordering::Acquire) == ring.indices.tail.tail.load(Ordering::Acquire)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_used_again_and_late_ones_last() {
        let mut program = Program::new(0, 0).unwrap();
        assert_eq!((program.take_record(), program.take_record()), (Some(0), Some(1)));
        program.release_record(1, true);
        program.release_record(0, false);
        assert_eq!((program.take_record(), program.take_record()), (Some(0), Some(1)));
        for n in 2..RECORDS {
            assert_eq!(program.take_record(), Some(n));
        }
        assert_eq!(program.take_record(), None);
    }

    #[test]
    fn records_in_use_go_from_an_agent_to_the_next() {
        let before = Program::new(0, 0).unwrap();
        before.records.header().kept.store(5, Ordering::Relaxed);
        for n in [1, 4] {
            before.records.record(n).unwrap().kept.store(1, Ordering::Relaxed);
        }
        let brought = || [0, 1].map(|n: usize| before.fds[n].try_clone().unwrap());
        let mut next = Program::resumed(0, 0, brought()).unwrap();
        assert!(next.is_in(&before.fds[0]) && !next.is_in(&before.fds[1]));
        assert_eq!(next.reserved, HashSet::from([1, 4]));
        let taken: Vec<_> = (0..5).map(|_| next.take_record().unwrap()).collect();
        assert_eq!(taken, [0, 2, 3, 5, 6]);
        // More than there are.
        before.records.header().kept.store(u32::MAX, Ordering::Relaxed);
        let mut next = Program::resumed(0, 0, brought()).unwrap();
        assert_eq!((next.take_record(), next.fresh), (Some(0), RECORDS));
    }

    #[test]
    fn memory_that_may_become_shorter_is_not_taken_over() {
        use crate::record::{RECORDS_LAYOUT, RecordsHeader};
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let of_layout = |layout: u32, len: usize, seals| {
            let fd = memfd_create("records", flags).unwrap();
            ftruncate(&fd, len as u64).unwrap();
            let at = std::mem::offset_of!(RecordsHeader, layout) as u64;
            rustix::io::pwrite(&fd, &layout.to_ne_bytes(), at).unwrap();
            fcntl_add_seals(&fd, seals).unwrap();
            fd
        };
        let both = SealFlags::SHRINK | SealFlags::GROW;
        let memory = |len, seals| of_layout(RECORDS_LAYOUT, len, seals);
        let len = Record::memory_len();
        let taken = |memory: OwnedFd| {
            let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            Program::resumed(0, 0, [memory, bell]).is_ok()
        };
        assert!(taken(memory(len, both)));
        assert!(!taken(of_layout(RECORDS_LAYOUT - 1, len, both)), "made by an older agent");
        assert!(!taken(memory(len, SealFlags::GROW)) && !taken(memory(len, SealFlags::SHRINK)));
        assert!(!taken(memory(len - 4096, both)) && !taken(memory(len + 4096, both)));
        let (pipe, _) = std::io::pipe().unwrap();
        assert!(!taken(pipe.into()));
    }

    #[test]
    fn bytes_are_split_by_lane() {
        let program = Program::new(0, 0).unwrap();
        let record = program.records.record(3).unwrap();
        record.init(10, 20, false);
        record.tx_off.store(100, Ordering::Relaxed);
        record.direct[0].store(60, Ordering::Relaxed);
        record.fabric[0].store(25, Ordering::Relaxed);
        let bytes = LaneBytes::of(record);
        assert_eq!((bytes.tcp.tx, bytes.direct.tx, bytes.fabric.tx), (15, 60, 25));
        assert_eq!(bytes.tcp.rx, 20);
    }

    #[test]
    fn a_program_ends_with_its_last_process_and_connection() {
        let mut registry = Registry::default();
        let mut program = Program::new(0, 0).unwrap();
        let record = program.take_record().unwrap();
        program.by_record.insert(record, 9);
        registry.programs.insert(1, program);
        assert!(registry.retire(1).is_none());
        assert!(registry.give_back(1, record, false).is_some());
        assert!(registry.programs.is_empty());
    }
}
