//! A connected pair in a case's hands, and the trace of what the case did with it.

use crate::far::{FROM_NEAR, Far};
use crate::lanes::{self, Lanes};
use crate::sys::{self, Ret};
use libc::c_int;
use std::fmt::Display;

/// Where the two ends are, and how they get together.
#[derive(Clone, Debug)]
pub struct Place {
    /// The far end's control socket.
    pub control: String,
    /// The far end's listeners: IPv4, IPv6.
    pub far: [String; 2],
    /// Addresses of this guest, without a port.
    pub near: [String; 2],
}

/// When in a connection's life a case begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Right after the handshake, long before an upgrade.
    Fresh,
    /// When enough has gone to and fro for an upgrade, which goes on beside the case.
    Across,
    /// On the lane, both ways.
    Lane,
}

impl Moment {
    /// All of them, and their names.
    pub const ALL: [(Self, &'static str); 3] =
        [(Self::Fresh, "fresh"), (Self::Across, "across"), (Self::Lane, "lane")];
}

/// Round trips of one byte that make a connection worth its lane.
const ROUNDS: usize = 10;

/// See the module.
pub struct Pair {
    /// This end's descriptor.
    pub near: c_int,
    /// The far end's number for its own.
    pub peer: String,
    /// The process with the far end.
    pub far: Far,
    /// Where both are.
    pub place: Place,
    /// What happened, line by line.
    pub trace: Vec<String>,
    sent: u64,
    lanes: Option<Lanes>,
    moment: Moment,
}

impl Pair {
    /// A connection that this end makes.
    pub fn connect(place: &Place, moment: Moment) -> Result<Self, String> {
        let mut pair = Self::apart(place, moment);
        let near = sys::socket(&place.far[0], libc::SOCK_CLOEXEC);
        let got = sys::connect(near, &place.far[0]);
        if got.0 != 0 {
            return Err(format!("connect: {got}"));
        }
        let peer = pair.far.ask("accept 0");
        pair.adopt(near, peer)?;
        Ok(pair)
    }

    /// Nothing is connected yet.
    pub fn apart(place: &Place, moment: Moment) -> Self {
        let far = Far::find(&place.control);
        let mut lanes = lanes::agent();
        lanes.iter_mut().for_each(Lanes::begin);
        Self {
            near: -1,
            peer: String::new(),
            far,
            place: place.clone(),
            trace: Vec::new(),
            sent: 0,
            lanes,
            moment,
        }
    }

    /// Takes a connection for its own, and brings it to where the case begins.
    pub fn adopt(&mut self, near: c_int, peer: String) -> Result<(), String> {
        (self.near, self.peer) = (near, peer);
        if self.moment == Moment::Fresh {
            return Ok(());
        }
        let on = |fd, on| sys::set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, on);
        on(near, 1);
        for _ in 0..ROUNDS {
            self.round()?;
        }
        if self.moment == Moment::Lane {
            self.reach_lane()?;
        }
        on(near, 0);
        Ok(())
    }

    fn round(&mut self) -> Result<(), String> {
        let sent = sys::send(self.near, &[0], 0);
        let there = self.far.ask(&format!("recv {} 1 {}", self.peer, 0));
        let back = self.far.ask(&format!("send {} 1 0", self.peer));
        sys::poll(self.near, libc::POLLIN, 4000);
        let here = sys::recv(self.near, &mut [0], 0);
        self.far.ask(&format!("again {}", self.peer));
        if sent.0 == 1 && here.0 == 1 && back == "1" && there.starts_with('1') {
            return Ok(());
        }
        Err(format!("warming up: {sent} {there} {back} {here}"))
    }

    fn reach_lane(&mut self) -> Result<(), String> {
        if self.lanes.is_none() {
            return Ok(());
        }
        let mut last = String::new();
        let end = std::time::Instant::now() + sys::SOON;
        while std::time::Instant::now() < end {
            self.round()?;
            let [local, peer] = [sys::name(self.near, false), sys::name(self.near, true)];
            let lanes = self.lanes.as_mut().unwrap_or_else(|| unreachable!("looked above"));
            if !lanes.any() {
                continue;
            }
            last = lanes.of(&local, &peer);
            if lanes::is_fast(&last) {
                lanes.begin();
                return Ok(());
            }
            // The agent has other things to do than to answer.
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        let why = self.lanes.as_ref().map(Lanes::declined).unwrap_or_default();
        let far = self.far.ask(&format!("lanes {}", self.peer));
        Err(format!("does not come to its lane: {last} {why}; the far end: {far}"))
    }

    /// Ends what is left: the counters of the case.
    pub fn end(mut self) -> (Vec<String>, Option<lanes::Moved>) {
        let moved = self.lanes.as_mut().map(Lanes::moved);
        if self.near >= 0 {
            sys::close(self.near);
        }
        (self.trace, moved)
    }

    /// A connection of this guest stays on TCP for this reason, as its agent says at both ends, while it goes on as `round`
    /// does. Only what is otherwise is written down: the kernel has no reasons.
    pub fn stays(&mut self, [local, peer]: [&str; 2], reason: &str, mut round: impl FnMut()) {
        let Some(lanes) = &self.lanes else { return };
        let want = format!("tcp tcp {reason}");
        let mut last = [String::new(), String::new()];
        let does = sys::soon(|| {
            round();
            last = [lanes.of(local, peer), lanes.of(peer, local)];
            last.iter().all(|is| *is == want)
        });
        if !does {
            self.note(format_args!("does not stay on TCP ({reason}): {last:?}"));
        }
    }

    /// Nothing was carried by a lane since the beginning.
    pub fn moves_nothing_fast(&mut self) {
        let moved = self.lanes.as_mut().map(Lanes::moved).unwrap_or_default();
        if moved.fast > 0 {
            self.note(format_args!("went over a lane: {moved:?}"));
        }
    }

    /// Why the connection is on TCP, as the agent says; nothing if it is not known any more.
    pub fn reason(&self) -> String {
        let Some(lanes) = self.lanes.as_ref().filter(|_| self.near >= 0) else { return String::new() };
        let is = lanes.of(&sys::name(self.near, false), &sys::name(self.near, true));
        is.strip_prefix("tcp tcp ").unwrap_or_default().to_owned()
    }

    // ---- writing down ----------------------------------------------------------------------------------------------

    /// Writes a line down.
    pub fn note(&mut self, line: impl Display) {
        self.trace.push(line.to_string());
    }

    /// Writes a call and its answer down.
    pub fn call(&mut self, what: impl Display, got: Ret) -> Ret {
        self.note(format_args!("{what} = {got}"));
        got
    }

    /// The same, with what was received.
    pub fn got(&mut self, what: impl Display, got: Ret, room: &[u8]) -> Ret {
        let data = &room[..got.0.clamp(0, room.len() as isize) as usize];
        self.note(format_args!("{what} = {got} {}", sys::show(data)));
        got
    }

    // ---- the near end ----------------------------------------------------------------------------------------------

    /// The next bytes of the near end's stream, which count as sent as far as `taken` says.
    pub fn next(&self, n: usize) -> Vec<u8> {
        sys::pattern(FROM_NEAR, self.sent, n)
    }

    /// So many of them were taken.
    pub fn taken(&mut self, got: Ret) {
        self.sent += got.0.max(0) as u64;
    }

    /// Sends the next `n` bytes.
    pub fn send(&mut self, n: usize, flags: c_int) -> Ret {
        let data = self.next(n);
        let got = sys::send(self.near, &data, flags);
        self.taken(got);
        self.call(format_args!("send {n} {flags:#x}"), got)
    }

    /// Receives into `n` bytes.
    pub fn recv(&mut self, n: usize, flags: c_int) -> Ret {
        let mut room = vec![0; n];
        let got = sys::recv(self.near, &mut room, flags);
        self.got(format_args!("recv {n} {flags:#x}"), got, &room)
    }

    /// Receives until `n` bytes are there or something else happens.
    pub fn take(&mut self, n: usize) {
        let mut data = Vec::new();
        let mut end = String::new();
        let mut room = vec![0; 1 << 16];
        while data.len() < n {
            if sys::poll(self.near, libc::POLLIN, 4000).0.0 == 0 {
                end = " and no more comes".into();
                break;
            }
            let most = room.len().min(n - data.len());
            match sys::recv(self.near, &mut room[..most], libc::MSG_DONTWAIT) {
                Ret(got, _) if got > 0 => data.extend_from_slice(&room[..got as usize]),
                Ret(-1, libc::EAGAIN) => {}
                other => {
                    end = format!(" then {other}");
                    break;
                }
            }
        }
        self.note(format_args!("take {n} = {} {}{end}", data.len(), sys::show(&data)));
    }

    /// What `poll` says at once.
    pub fn polled(&mut self, events: i16) {
        let (got, revents) = sys::poll(self.near, events, 0);
        self.note(format_args!("poll {events:#x} = {got} {revents:#x}"));
    }

    /// Fills the way to the far end until a send would block. How much that is, is not written down.
    pub fn fill(&mut self) {
        // Buffers that the kernel does not tune, else it finds room now and then.
        sys::set_option(self.near, libc::SOL_SOCKET, libc::SO_SNDBUF, 1 << 16);
        self.far("option", &[libc::SOL_SOCKET.into(), libc::SO_RCVBUF.into(), 1 << 16]);
        let piece = vec![7; 1 << 16];
        let (mut idle, mut size) = (0, piece.len());
        while idle < 5 || sys::poll(self.near, libc::POLLOUT, 0).1 & libc::POLLOUT != 0 {
            match sys::send(self.near, &piece[..size], libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) {
                Ret(-1, libc::EAGAIN) if size > 1 => size = 1,
                Ret(-1, libc::EAGAIN) => {
                    idle += 1;
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                Ret(-1, _) => return self.note("cannot be filled"),
                _ => idle = 0,
            }
        }
    }

    /// Waits until `n` bytes can be read.
    pub fn arrived(&mut self, n: usize) {
        let near = self.near;
        if !sys::soon(|| sys::unread(near) >= n) {
            self.note(format_args!("{n} bytes have not arrived, {} have", sys::unread(near)));
        }
    }

    /// Waits for an event of `poll`.
    pub fn until(&mut self, events: i16) {
        let near = self.near;
        if !sys::soon(|| sys::poll(near, events, 0).1 & events != 0) {
            self.note(format_args!("no {events:#x} has come"));
        }
    }

    /// Waits for the far end's FIN.
    pub fn until_end(&mut self) {
        self.until(libc::POLLRDHUP);
    }

    /// Waits for a reset.
    pub fn until_reset(&mut self) {
        self.until(libc::POLLERR);
    }

    // ---- the far end -----------------------------------------------------------------------------------------------

    /// Has the far end do something, with its descriptor.
    pub fn far(&mut self, verb: &str, numbers: &[i64]) -> String {
        let numbers: Vec<String> = numbers.iter().map(i64::to_string).collect();
        let line = match verb.strip_prefix("later ") {
            Some(verb) => format!("later {verb} {} {}", self.peer, numbers.join(" ")),
            None => format!("{verb} {} {}", self.peer, numbers.join(" ")),
        };
        self.far.ask(&line)
    }

    /// The same, written down.
    pub fn far_says(&mut self, verb: &str, numbers: &[i64]) {
        let answer = self.far(verb, numbers);
        self.note(format_args!("far {verb} {numbers:?} = {answer}"));
    }

    /// The far end sends `n` bytes, and they arrive.
    pub fn receives(&mut self, n: usize) {
        let there = sys::unread(self.near);
        let sent = self.far("send", &[n as i64, 0]);
        if sent != n.to_string() {
            self.note(format_args!("far send {n} = {sent}"));
        }
        self.arrived(there + n);
    }
}
