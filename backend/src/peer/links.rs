//! The peer thread: who is connected, who is being dialled, who is still a stranger.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

use super::connection::{Connection, End};
use super::message::{HostName, PeerMessage};
use super::tls::{self, Tls};
use super::{Command, Down, Error, PeerEvent, Refusal};
use crate::config::{Backends, Peer};

/// A connection must be somebody's by then.
const PATIENCE: Duration = Duration::from_secs(3);

/// This many accepted connections may be nobody's yet.
const MAX_STRANGERS: usize = 64;

/// Waiting time before the first redial: a restarted process needs about as long to listen again.
const FIRST_DELAY: Duration = Duration::from_millis(100);

/// Waiting times double up to this.
const LAST_DELAY: Duration = Duration::from_secs(2);

/// The host with the greater name gives the other's dial so much of a start, so that two seldom meet.
const COURTESY: Duration = Duration::from_millis(30);

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
const FIRST: usize = 2;

/// How far a connection has got.
enum Stage {
    /// TCP is connecting.
    Connecting,
    /// TLS, then the other end's hello.
    Greeting { said_hello: bool },
    /// Somebody's.
    Up,
}

struct Member {
    connection: Option<Connection>,
    from: SocketAddr,
    stage: Stage,
    /// The peer: known from the start if we dialled, from its hello otherwise.
    host: Option<HostName>,
    dialled: bool,
    boot_id: u64,
    deadline: Instant,
}

/// What is known of a peer.
struct Link {
    peer: Peer,
    current: Option<usize>,
    dialling: Option<usize>,
    redial: Instant,
    delay: Duration,
    /// What the last attempt came to, so that the log says it once.
    last: Option<Refusal>,
}

/// See the module.
pub struct Links {
    host: HostName,
    boot_id: u64,
    tls: Tls,
    listener: TcpListener,
    address: SocketAddr,
    poll: Poll,
    waker: Arc<Waker>,
    commands: Receiver<Command>,
    events: Sender<PeerEvent>,
    wake: Box<dyn Fn() + Send>,
    news: bool,
    members: HashMap<usize, Member>,
    next: usize,
    links: HashMap<HostName, Link>,
}

impl Links {
    pub fn new(
        config: &Backends,
        host: &HostName,
        boot_id: u64,
        commands: Receiver<Command>,
        events: Sender<PeerEvent>,
        wake: Box<dyn Fn() + Send>,
    ) -> Result<Self, Error> {
        let tls = Tls::load(&config.tls, host)?;
        for peer in &config.peers {
            tls::server_name(&peer.host).ok_or_else(|| tls::Error::Name(peer.host.clone()))?;
        }
        let listen = |source| Error::Listen { address: config.listen, source };
        let mut listener = TcpListener::bind(config.listen).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let poll = Poll::new().map_err(Error::Readiness)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).map_err(Error::Readiness)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).map_err(Error::Readiness)?);
        let now = Instant::now();
        let link = |peer: &Peer| {
            let redial = if *host < peer.host { now } else { now + COURTESY };
            let peer = peer.clone();
            Link { peer, current: None, dialling: None, redial, delay: FIRST_DELAY, last: None }
        };
        let links = config.peers.iter().map(|peer| (peer.host.clone(), link(peer))).collect();
        let (host, members) = (host.clone(), HashMap::new());
        Ok(Self {
            host,
            boot_id,
            tls,
            listener,
            address,
            poll,
            waker,
            commands,
            events,
            wake,
            news: false,
            members,
            next: FIRST,
            links,
        })
    }

    pub fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Runs until told to stop.
    pub fn run(mut self) {
        let mut ready = Events::with_capacity(64);
        loop {
            let now = Instant::now();
            self.handle_time(now);
            self.notify();
            let wait = self.next_deadline().map(|at| at.saturating_duration_since(now));
            // Rounded up, so that a deadline is over when its wait is.
            let wait = wait.map(|wait| wait + Duration::from_millis(1));
            if let Err(error) = self.poll.poll(&mut ready, wait)
                && error.kind() != ErrorKind::Interrupted
            {
                tracing::error!(%error, "the peer thread cannot wait for its sockets");
                return;
            }
            for event in &ready {
                match event.token() {
                    LISTENER => self.accept(),
                    WAKER => {}
                    Token(id) => self.handle_ready(id),
                }
            }
            if !self.handle_commands() {
                self.members
                    .values_mut()
                    .filter_map(|member| member.connection.as_mut())
                    .for_each(Connection::close);
                return;
            }
        }
    }

    fn tell(&mut self, event: PeerEvent) {
        // Nobody listens only while the daemon goes down.
        let _ = self.events.send(event);
        self.news = true;
    }

    fn notify(&mut self) {
        if std::mem::take(&mut self.news) {
            (self.wake)();
        }
    }

    /// False when it is time to go.
    fn handle_commands(&mut self) -> bool {
        let mut spoken_to = Vec::new();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Stop => return false,
                Command::Reset(host) => {
                    if let Some(id) = self.links.get(&host).and_then(|link| link.current) {
                        self.end(id, Down::Reset, Refusal::HungUp);
                    }
                }
                Command::Send(host, message) => {
                    let Some(id) = self.links.get(&host).and_then(|link| link.current) else { continue };
                    let connection = self.members.get_mut(&id).and_then(|member| member.connection.as_mut());
                    if let Some(connection) = connection {
                        connection.send(&message);
                        if spoken_to.last() != Some(&id) {
                            spoken_to.push(id);
                        }
                    }
                }
            }
        }
        for id in spoken_to {
            self.write(id);
        }
        true
    }

    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.members.values().filter(|member| !matches!(member.stage, Stage::Up));
        let idle = self.links.values().filter(|link| link.current.is_none() && link.dialling.is_none());
        waiting.map(|member| member.deadline).chain(idle.map(|link| link.redial)).min()
    }

    fn handle_time(&mut self, now: Instant) {
        let late = |member: &Member| !matches!(member.stage, Stage::Up) && member.deadline <= now;
        let late: Vec<usize> =
            self.members.iter().filter(|(_, member)| late(member)).map(|(&id, _)| id).collect();
        for id in late {
            self.end(id, Down::Closed, Refusal::TimedOut);
        }
        let due = |link: &&Link| link.current.is_none() && link.dialling.is_none() && link.redial <= now;
        let due: Vec<HostName> = self.links.values().filter(due).map(|link| link.peer.host.clone()).collect();
        for host in due {
            self.dial(&host, now);
        }
    }

    fn add(&mut self, mut stream: TcpStream, mut member: Member) -> io::Result<usize> {
        let id = self.next;
        let both = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, Token(id), both)?;
        let session = match &member.host {
            Some(host) => self.tls.dial(host),
            None => self.tls.accept(),
        };
        let session = session.map_err(|reason| io::Error::other(reason.name()))?;
        member.connection = Some(Connection::new(stream, session));
        self.next += 1;
        self.members.insert(id, member);
        Ok(id)
    }

    fn dial(&mut self, host: &HostName, now: Instant) {
        let Some(link) = self.links.get_mut(host) else { return };
        link.redial = now + link.delay;
        link.delay = (link.delay * 2).min(LAST_DELAY);
        let from = link.peer.control;
        let member = Member {
            connection: None,
            from,
            stage: Stage::Connecting,
            host: Some(host.clone()),
            dialled: true,
            boot_id: 0,
            deadline: now + PATIENCE,
        };
        let added = TcpStream::connect(from).and_then(|stream| self.add(stream, member));
        match added {
            Ok(id) => {
                if let Some(link) = self.links.get_mut(host) {
                    link.dialling = Some(id);
                }
            }
            Err(error) => tracing::debug!(%host, %error, "cannot dial"),
        }
    }

    fn accept(&mut self) {
        loop {
            let (stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) =>
                {
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the peers' port");
                    return;
                }
            };
            self.make_place();
            let _ = stream.set_nodelay(true);
            let member = Member {
                connection: None,
                from,
                stage: Stage::Greeting { said_hello: false },
                host: None,
                dialled: false,
                boot_id: 0,
                deadline: Instant::now() + PATIENCE,
            };
            if let Err(error) = self.add(stream, member) {
                tracing::warn!(%from, %error, "cannot take a connection");
            }
        }
    }

    /// Too many strangers: the one that has waited longest goes.
    fn make_place(&mut self) {
        let strangers = self.members.iter().filter(|(_, m)| !m.dialled && !matches!(m.stage, Stage::Up));
        if strangers.clone().count() >= MAX_STRANGERS
            && let Some((&oldest, _)) = strangers.min_by_key(|(_, member)| member.deadline)
        {
            self.end(oldest, Down::Closed, Refusal::Crowded);
        }
    }

    fn handle_ready(&mut self, id: usize) {
        if !self.connected(id) {
            return;
        }
        loop {
            let Some(connection) = self.members.get_mut(&id).and_then(|m| m.connection.as_mut()) else {
                return;
            };
            let more = connection.read();
            self.greet(id);
            while self.take(id) {}
            // Written after reading: TLS may have an answer, and an error of writing hides why the peer hung up.
            self.write(id);
            if !more {
                return;
            }
        }
    }

    /// Whether TCP is connected; ends the attempt if it has failed.
    fn connected(&mut self, id: usize) -> bool {
        let Some(member) = self.members.get_mut(&id) else { return false };
        if !matches!(member.stage, Stage::Connecting) {
            return true;
        }
        let Some(stream) = member.connection.as_mut().map(Connection::stream) else { return false };
        let failed = !matches!(stream.take_error(), Ok(None));
        if failed {
            // Nobody listens: the usual sight of a backend that is not there, and no refusal.
            self.forget(id);
            return false;
        }
        if stream.peer_addr().is_err() {
            return false;
        }
        let _ = stream.set_nodelay(true);
        member.stage = Stage::Greeting { said_hello: false };
        true
    }

    /// Says hello, once TLS has proved the other end.
    fn greet(&mut self, id: usize) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let (Some(connection), Stage::Greeting { said_hello }) = (&mut member.connection, &mut member.stage)
        else {
            return;
        };
        if connection.is_authenticated() && !*said_hello {
            *said_hello = true;
            connection.send(&PeerMessage::Hello { host: self.host.clone(), boot_id: self.boot_id });
        }
    }

    fn write(&mut self, id: usize) {
        let Some(connection) = self.members.get_mut(&id).and_then(|m| m.connection.as_mut()) else { return };
        match connection.write() {
            Ok(()) => {}
            // The reader finds out why the peer hung up.
            Err(End::Closed) => {
                connection.read();
                while self.take(id) {}
            }
            Err(end) => self.end_by(id, end),
        }
    }

    /// Handles the next message; false if there is none.
    fn take(&mut self, id: usize) -> bool {
        let Some(member) = self.members.get_mut(&id) else { return false };
        let Some(connection) = &mut member.connection else { return false };
        let message = match connection.next() {
            Ok(Some(message)) => message,
            Ok(None) => return false,
            Err(end) => {
                self.end_by(id, end);
                return false;
            }
        };
        match (&member.stage, message) {
            (Stage::Up, PeerMessage::Hello { .. }) => self.end(id, Down::SecondHello, Refusal::NoHello),
            (Stage::Up, message) => {
                if let Some(host) = member.host.clone() {
                    self.tell(PeerEvent::Message { host, message });
                }
            }
            (_, PeerMessage::Hello { host, boot_id }) => self.introduce(id, host, boot_id),
            _ => self.end(id, Down::Closed, Refusal::NoHello),
        }
        true
    }

    /// The other end says who it is; its certificate must agree.
    fn introduce(&mut self, id: usize, host: HostName, boot_id: u64) {
        let Some(member) = self.members.get_mut(&id) else { return };
        let certificate = member.connection.as_ref().and_then(Connection::certificate);
        let proven = certificate.is_some_and(|certificate| tls::bears(certificate, &host));
        let known = self.links.contains_key(&host);
        if member.host.as_ref().is_some_and(|dialled| *dialled != host) || known && !proven {
            return self.end(id, Down::Closed, Refusal::HelloMismatch);
        }
        if !known {
            return self.end(id, Down::Closed, Refusal::UnknownPeer);
        }
        (member.host, member.boot_id) = (Some(host.clone()), boot_id);
        let dialled = member.dialled;
        let Some(link) = self.links.get_mut(&host) else { return };
        if dialled && link.dialling == Some(id) {
            link.dialling = None;
        }
        if let Some(current) = link.current {
            let Some(old) = self.members.get(&current) else { return };
            let ours = self.host < host;
            let stays = old.boot_id == boot_id && old.dialled != dialled && old.dialled == ours;
            if stays {
                return self.forget(id);
            }
            self.end(current, Down::Replaced, Refusal::HungUp);
        }
        if let Some(member) = self.members.get_mut(&id) {
            member.stage = Stage::Up;
        }
        if let Some(link) = self.links.get_mut(&host) {
            (link.current, link.delay, link.last) = (Some(id), FIRST_DELAY, None);
        }
        tracing::info!(%host, dialled, "peer is up");
        self.tell(PeerEvent::Up { host, boot_id });
    }

    fn end_by(&mut self, id: usize, end: End) {
        let (down, refusal) = match end {
            End::Closed => (Down::Closed, Refusal::HungUp),
            End::Io(kind) => (Down::Io(kind), Refusal::HungUp),
            End::Tls(reason) => (Down::Tls(reason), reason),
            End::Message(error) => (Down::Message(error), Refusal::Message(error)),
            End::Overrun => (Down::Overrun, Refusal::HungUp),
        };
        self.end(id, down, refusal);
    }

    /// Ends a connection and says why: `down` if it was somebody's, else `refusal`.
    fn end(&mut self, id: usize, down: Down, refusal: Refusal) {
        let Some(member) = self.members.get(&id) else { return };
        let (from, host) = (member.from, member.host.clone());
        match (&member.stage, host) {
            (Stage::Up, Some(host)) => {
                tracing::info!(%host, reason = down.name(), "peer is down");
                self.forget(id);
                self.tell(PeerEvent::Down { host, reason: down });
            }
            (_, host) => {
                self.forget(id);
                let link = host.as_ref().and_then(|host| self.links.get_mut(host));
                let again = link.is_some_and(|link| link.last.replace(refusal) == Some(refusal));
                if !again {
                    tracing::warn!(%from, reason = refusal.name(), "refused a peer's connection");
                }
                self.tell(PeerEvent::Refused { from, reason: refusal });
            }
        }
    }

    /// Drops a connection without a word.
    fn forget(&mut self, id: usize) {
        let Some(mut member) = self.members.remove(&id) else { return };
        if let Some(connection) = &mut member.connection {
            if !matches!(member.stage, Stage::Connecting) {
                connection.close();
            }
            let _ = self.poll.registry().deregister(connection.stream());
        }
        let Some(link) = member.host.and_then(|host| self.links.get_mut(&host)) else { return };
        if link.dialling == Some(id) {
            link.dialling = None;
        }
        if link.current == Some(id) {
            link.current = None;
            link.redial = Instant::now() + link.delay;
        }
    }
}
