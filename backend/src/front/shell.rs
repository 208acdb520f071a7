//! The front's event loop: one thread, which owns QEMU's session, the streams' sockets and the link to the daemon.
//!
//! A turn takes packets from the guest, does what they mean, and brings the guest what there is, each up to a budget; then
//! it asks the kernel for more. Nobody waits for the daemon: while it is absent QEMU and the guest are answered as ever.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType, recv,
    sendmsg, shutdown, socketpair,
};
use vhost::vhost_user::{BackendReqHandler, Error as QemuError};

use super::link::{Link, News, PIDFD, State};
use super::packet::MAX_PAYLOAD;
use super::session::{Event, KICK, RX, Session, TX};
use super::streams::{Effect, Rx, Streams};
use super::vring::{Broken, Taken};
use super::{Error, Options};

const LISTENER: u64 = 0;
const QEMU: u64 = 1;
const LINK: u64 = 4;
const SIGNAL: u64 = 6;
/// Streams' tokens: their numbers, from here on.
const STREAM: u64 = 16;

/// Packets of each direction that one turn moves, so that QEMU and the daemon are heard in between.
const BUDGET: usize = 128;
/// QEMU sends a message whole, or it is not QEMU.
const QEMU_TIMEOUT: Duration = Duration::from_secs(5);

/// QEMU, while it is connected.
struct Qemu {
    handler: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
}

/// The front.
pub struct Front {
    options: Options,
    epoll: Arc<OwnedFd>,
    listener: UnixListener,
    qemu: Option<Qemu>,
    streams: Streams,
    ends: HashMap<u64, OwnedFd>,
    /// Streams that wait for what becomes of the daemon.
    parked: Vec<(u64, u32, u32)>,
    link: Rc<RefCell<Link>>,
    signals: Option<UnixStream>,
    stopping: bool,
    payload: Vec<u8>,
    /// How many kinds of drops have been logged.
    named: usize,
}

impl Front {
    /// Listens for QEMU.
    ///
    /// # Errors
    ///
    /// What cannot be listened at, or what the system does not give.
    pub fn new(options: Options) -> Result<Self, Error> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(|e| Error::System(e.into()))?;
        let listener =
            listen(&options).map_err(|source| Error::Listen { path: options.socket.clone(), source })?;
        let (cid, port) = (u64::from(options.cid), options.port);
        let epoll = Arc::new(epoll);
        let front = Self {
            streams: Streams::new(cid, port, options.streams),
            link: Rc::new(RefCell::new(Link::new(options.daemon.clone(), cid, epoll.clone()))),
            options,
            epoll,
            listener,
            qemu: None,
            ends: HashMap::new(),
            parked: Vec::new(),
            signals: None,
            stopping: false,
            payload: Vec::with_capacity(MAX_PAYLOAD),
            named: 0,
        };
        front.watch(&front.listener, LISTENER, EventFlags::IN).map_err(Error::System)?;
        Ok(front)
    }

    /// SIGTERM and SIGINT end the front in order.
    ///
    /// # Errors
    ///
    /// If the system takes no handler.
    pub fn watch_signals(&mut self) -> io::Result<()> {
        let (reader, writer) = UnixStream::pair()?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGTERM, writer.try_clone()?)?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGINT, writer)?;
        self.watch(&reader, SIGNAL, EventFlags::IN)?;
        self.signals = Some(reader);
        Ok(())
    }

    /// Serves until it is told to end.
    ///
    /// # Errors
    ///
    /// If waiting itself fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        self.look_for_daemon();
        loop {
            let more = self.turn();
            if self.stopping {
                self.end();
                return Ok(());
            }
            let until =
                self.link.borrow().next_deadline().map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = if more { Some(Duration::ZERO) } else { until };
            let timeout = timeout.map(|t| rustix::event::Timespec {
                tv_sec: t.as_secs() as i64,
                tv_nsec: i64::from(t.subsec_nanos()),
            });
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                self.handle(event.data.u64(), event.flags);
            }
            self.look_for_daemon();
        }
    }

    fn watch(&self, fd: impl AsFd, token: u64, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(token), flags)?)
    }

    fn handle(&mut self, token: u64, flags: EventFlags) {
        match token {
            LISTENER => self.accept(),
            QEMU => self.qemu_ready(),
            LINK => self.link_ready(),
            PIDFD => self.pidfd_ready(),
            SIGNAL => self.stopping = true,
            KICK..LINK => {
                let index = (token - KICK) as usize;
                self.with_session(|session, _| session.vring(index).0.heard());
            }
            _ => self.stream_ready(token - STREAM, flags),
        }
    }

    // ------------------------------------------------------------ QEMU

    fn accept(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        // The request handler takes nothing else, though one thread has it all.
        #[allow(clippy::arc_with_non_send_sync)]
        let session = Arc::new(Mutex::new(Session::new(
            self.options.cid.into(),
            self.epoll.clone(),
            self.link.clone(),
        )));
        // One at a time: the next may connect, and waits.
        let watched = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_read_timeout(Some(QEMU_TIMEOUT)))
            .and_then(|()| stream.set_write_timeout(Some(QEMU_TIMEOUT)))
            .and_then(|()| self.watch(&stream, QEMU, EventFlags::IN))
            .and_then(|()| Ok(epoll::delete(&self.epoll, &self.listener)?));
        if let Err(error) = watched {
            return tracing::warn!(%error, "cannot serve QEMU");
        }
        tracing::info!("QEMU connected");
        let handler = BackendReqHandler::from_stream(stream, session.clone());
        self.qemu = Some(Qemu { handler, session });
    }

    fn qemu_ready(&mut self) {
        let Some(qemu) = &mut self.qemu else { return };
        if let Err(error) = qemu.handler.handle_request() {
            return self.qemu_gone(&error);
        }
        while let Some(event) = self.with_session(|session, _| session.poll_event()).flatten() {
            match event {
                Event::Memory => self.tell_memory(),
                Event::Rebooted => {
                    self.streams.handle_guest_gone();
                    self.obey();
                    self.link.borrow_mut().tell_reset();
                }
                Event::Running => self.link.borrow_mut().tell_resumed(),
            }
        }
    }

    /// Every trace of the guest goes, its memory first of all; the next QEMU finds a device that is new.
    fn qemu_gone(&mut self, error: &QemuError) {
        match error {
            QemuError::Disconnected => tracing::info!("QEMU is gone"),
            error => tracing::warn!(%error, "QEMU is hung up on"),
        }
        self.qemu = None;
        self.streams.handle_guest_gone();
        self.obey();
        self.link.borrow_mut().tell_gone();
        tracing::info!(drops = ?self.streams.drops.iter().collect::<Vec<_>>(), "session over");
        if let Err(error) = self.watch(&self.listener, LISTENER, EventFlags::IN) {
            tracing::error!(%error, "cannot listen for QEMU any more");
            self.stopping = true;
        }
    }

    fn with_session<T>(&mut self, what: impl FnOnce(&mut Session, &mut Vec<u8>) -> T) -> Option<T> {
        let qemu = self.qemu.as_ref()?;
        Some(what(&mut lock(&qemu.session), &mut self.payload))
    }

    // ------------------------------------------------------------ the guest

    /// Moves packets; true if there are more.
    fn turn(&mut self) -> bool {
        let Some(session) = self.qemu.as_ref().map(|qemu| qemu.session.clone()) else { return false };
        let taken = self.take_packets(&session);
        let full = !self.streams.wants_packets();
        let brought = self.bring_packets(&session);
        let more = taken || brought || (full && self.streams.wants_packets());
        let drops = self.streams.drops.iter().count();
        if drops > self.named {
            // Each name once: what a guest does must not fill a disk.
            let names: Vec<_> = self.streams.drops.iter().skip(self.named).map(|(name, _)| name).collect();
            tracing::warn!(?names, "refused what the guest did");
            self.named = drops;
        }
        more
    }

    fn take_packets(&mut self, session: &Mutex<Session>) -> bool {
        let mut session = lock(session);
        match self.try_take(&mut session) {
            Ok(more) => more,
            Err(Broken) => {
                session.vring(TX).0.break_down();
                self.broken();
                false
            }
        }
    }

    fn try_take(&mut self, session: &mut Session) -> Result<bool, Broken> {
        let (vring, memory) = session.vring(TX);
        if !vring.runs() {
            return Ok(false);
        }
        vring.disarm(memory)?;
        let mut taken = 0;
        let more = loop {
            if taken == BUDGET {
                break true;
            }
            // The guest has to take resets first.
            if !self.streams.wants_packets() {
                break false;
            }
            let mut payload = std::mem::take(&mut self.payload);
            let packet = vring.take(memory, &mut payload);
            match packet {
                Ok(Some(Taken::Packet(header))) => self.streams.handle_packet(&header, &payload),
                Ok(Some(Taken::BadPayload(header, name))) => self.streams.handle_bad_packet(&header, name),
                Ok(Some(Taken::Bad(name))) => self.streams.drops.count(name),
                Ok(None) | Err(_) => {}
            }
            self.payload = payload;
            self.obey();
            match packet? {
                Some(_) => taken += 1,
                None if vring.arm(memory)? => {
                    // There must be one now, or the queue contradicts itself.
                    taken += 1;
                    vring.disarm(memory)?;
                }
                None => break false,
            }
        };
        vring.tell(memory);
        Ok(more)
    }

    fn bring_packets(&mut self, session: &Mutex<Session>) -> bool {
        let mut session = lock(session);
        match self.try_bring(&mut session) {
            Ok(more) => more,
            Err(Broken) => {
                session.vring(RX).0.break_down();
                self.broken();
                false
            }
        }
    }

    fn try_bring(&mut self, session: &mut Session) -> Result<bool, Broken> {
        let (vring, memory) = session.vring(RX);
        if !vring.runs() {
            return Ok(false);
        }
        let mut brought = 0;
        let more = loop {
            if brought == BUDGET {
                break true;
            }
            brought += 1;
            let slot = match vring.slot(memory)? {
                Some(Ok(slot)) => slot,
                Some(Err(name)) => {
                    self.streams.drops.count(name);
                    continue;
                }
                // Without a buffer nothing is taken from the streams; more buffers are told.
                None if vring.arm(memory)? => continue,
                None => break false,
            };
            match self.streams.poll_rx(slot.room) {
                None => {
                    vring.put_back(slot);
                    break false;
                }
                Some(Rx::Packet(header)) => {
                    if !vring.fill(memory, slot, &header, &[])? {
                        self.streams.drops.count("descriptor-address");
                    }
                }
                Some(Rx::Read { id, max }) => match self.read(id, max) {
                    0 => vring.put_back(slot),
                    len => {
                        let header = self.streams.handle_read(id, len);
                        if !vring.fill(memory, slot, &header, &self.payload[..len])? {
                            self.streams.handle_fault(id, Some("descriptor-address"));
                        }
                    }
                },
            }
            self.obey();
        };
        vring.tell(memory);
        Ok(more)
    }

    /// Reads from a stream's socket; 0 if there is nothing for the guest, and the stream knows why.
    fn read(&mut self, id: u64, max: usize) -> usize {
        let Some(end) = self.ends.get(&id) else {
            self.streams.handle_end(id);
            return 0;
        };
        self.payload.resize(max.min(MAX_PAYLOAD), 0);
        match recv(end, &mut self.payload[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => self.streams.handle_end(id),
            Ok((_, len)) => return len,
            Err(Errno::AGAIN | Errno::INTR) => self.streams.handle_empty(id),
            // The daemon closed without having read everything.
            Err(_) => self.streams.handle_fault(id, None),
        }
        0
    }

    /// A queue is of no more use: neither are the streams.
    fn broken(&mut self) {
        self.streams.drops.count("queue-broken");
        self.streams.handle_stop();
        self.obey();
    }

    // ------------------------------------------------------------ streams

    fn obey(&mut self) {
        while let Some(effect) = self.streams.poll_effect() {
            match effect {
                Effect::Open { id, guest_port, host_port } => self.open(id, guest_port, host_port),
                Effect::Write(id) => self.write(id),
                Effect::ShutWrite(id) => self.shut(id, Shutdown::Write),
                Effect::ShutRead(id) => self.shut(id, Shutdown::Read),
                Effect::Close(id) => {
                    self.ends.remove(&id);
                    self.parked.retain(|(parked, ..)| *parked != id);
                }
            }
        }
    }

    fn open(&mut self, id: u64, guest_port: u32, host_port: u32) {
        let state = self.link.borrow().state();
        match state {
            State::Absent => self.streams.handle_refused(id, "daemon-absent"),
            State::Unknown => self.parked.push((id, guest_port, host_port)),
            State::Up => match self.hand_over(id, guest_port, host_port) {
                Ok(end) => {
                    self.ends.insert(id, end);
                    self.streams.handle_opened(id);
                }
                Err(error) => {
                    tracing::debug!(%error, "cannot hand a stream over");
                    self.streams.handle_refused(id, "daemon-unreachable");
                }
            },
        }
    }

    fn hand_over(&mut self, id: u64, guest_port: u32, host_port: u32) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (end, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // Edges: what is ready is remembered, and a hang-up is told once.
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.watch(&end, STREAM + id, edges)?;
        if !self.link.borrow_mut().tell_stream(id, guest_port, host_port, theirs) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        Ok(end)
    }

    fn stream_ready(&mut self, id: u64, flags: EventFlags) {
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            self.write(id);
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.streams.handle_deaf(id);
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.streams.handle_readable(id);
        }
        self.obey();
    }

    fn write(&mut self, id: u64) {
        loop {
            let (first, second) = self.streams.pending(id);
            let Some(end) = self.ends.get(&id).filter(|_| !first.is_empty()) else { return };
            let parts = [IoSlice::new(first), IoSlice::new(second)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(end, &parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(len) => self.streams.handle_written(id, len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return,
                Err(_) => return self.streams.handle_deaf(id),
            }
        }
    }

    fn shut(&mut self, id: u64, how: Shutdown) {
        if let Some(end) = self.ends.get(&id) {
            // The other end may have closed already.
            let _ = shutdown(end, how);
        }
    }

    // ------------------------------------------------------------ the daemon

    fn look_for_daemon(&mut self) {
        if !self.link.borrow_mut().handle_timeout(Instant::now()) {
            return;
        }
        if let Some(socket) = self.link.borrow().socket() {
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if let Err(error) = self.watch(socket, LINK, flags) {
                tracing::warn!(%error, "cannot watch the daemon");
            }
        }
    }

    fn link_ready(&mut self) {
        loop {
            let news = self.link.borrow_mut().handle_ready(Instant::now());
            let Some(news) = news else { return };
            self.take_news(news);
        }
    }

    fn pidfd_ready(&mut self) {
        let news = self.link.borrow_mut().handle_pidfd(Instant::now());
        if let Some(news) = news {
            self.take_news(news);
        }
    }

    fn take_news(&mut self, news: News) {
        tracing::info!(?news, "daemon");
        match news {
            News::Returned | News::Arrived => {
                if news == News::Arrived {
                    self.streams.handle_daemon_gone();
                }
                self.link.borrow_mut().tell_what_was_missed();
                self.tell_memory();
                self.unpark();
            }
            News::Lost => {}
            News::Dead => {
                self.streams.handle_daemon_gone();
                self.unpark();
            }
        }
        self.obey();
    }

    /// Those who waited are treated as if they came now.
    fn unpark(&mut self) {
        for (id, guest_port, host_port) in std::mem::take(&mut self.parked) {
            self.open(id, guest_port, host_port);
        }
    }

    fn tell_memory(&mut self) {
        if let Some(qemu) = &self.qemu {
            self.link.borrow_mut().tell_memory(lock(&qemu.session).regions());
        }
    }

    // ------------------------------------------------------------ the end

    /// The guest's sockets are reset, as far as it has given us buffers for that.
    fn end(&mut self) {
        self.streams.handle_stop();
        self.obey();
        if let Some(session) = self.qemu.as_ref().map(|qemu| qemu.session.clone()) {
            for _ in 0..=self.options.streams / BUDGET {
                self.bring_packets(&session);
            }
        }
        tracing::info!(drops = ?self.streams.drops.iter().collect::<Vec<_>>(), "front ends");
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.options.socket);
    }
}

/// One thread takes it, and never twice at a time.
fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that a dead front left is replaced; a live one is an error.
fn listen(options: &Options) -> io::Result<UnixListener> {
    let path = &options.socket;
    let bound = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            match UnixStream::connect(path) {
                Err(dead) if dead.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
                _ => return Err(error),
            }
            UnixListener::bind(path)?
        }
        other => other?,
    };
    bound.set_nonblocking(true)?;
    Ok(bound)
}
