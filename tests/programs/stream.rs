//! An ordinary TCP program that knows what it ought to receive: the whole-program tests run it plainly and accelerated.
//!
//! ```text
//! stream serve ADDR [--once] [--epoll]
//! stream connect ADDR --bytes N | --until-eof   [--seed S] [--one-way] [--no-trailer] [--connections N] …
//! stream echo ADDR --rounds N | --until-eof     [--seed S] [--size BYTES] [--connections N] [--idle-after N]
//! stream poke ADDR [--hex BYTES] [--hold]
//! ```
//!
//! `connect` and `serve` send each other pseudo-random streams at the same time, in writes and reads of random size,
//! half-close, and compare what they receive byte by byte with what the seed in the connection's first message makes
//! of it, and its SHA-256 with the one that ends the stream. Each connection ends with one line of JSON on standard
//! output; the exit status is 0 only if everything was as it should be. It knows nothing of vsocket.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

const USAGE: &str = "stream serve ADDR [--once] [--epoll] [--pace BYTES] [--answer-at-end]
    --answer-at-end   sends its own stream when it has received all of the client's
stream connect ADDR --bytes N | --until-eof
    --seed S          of the stream from here; the one back has S + 1 (default 1)
    --epoll           one thread and non-blocking I/O
    --from ADDR       the local address
    --one-way         the server only receives
    --no-trailer      sends its bytes, then sleeps until it is killed; with --one-way
    --report FILE     keeps the number of bytes that write() has taken in FILE, 8 bytes
    --pause-after N   after N bytes, says `paused` and waits for a line on standard input
    --pace BYTES      sends at most so many bytes a second
    --until-eof       sends until standard input ends
    --connections N   so many connections with as many bytes, one after the other
stream echo ADDR --rounds N | --until-eof
    --seed S --from ADDR
    --size BYTES      of a message (default 64)
    --connections N   so many connections with as many rounds, one after the other
    --idle-after N    after N rounds, says `idle` and waits for standard input to end, then goes on
    --every MS        a round no more often than that
stream poke ADDR [--hex BYTES] [--hold]
    connects, sends the bytes, and reads to the end; --hold: waits for the end without sending more";

/// The largest write and read.
const LARGEST: usize = 1 << 20;

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let mut words: VecDeque<String> = std::env::args().skip(1).collect();
    let command = words.pop_front().unwrap_or_default();
    let done = Options::parse(words).and_then(|options| match command.as_str() {
        "serve" => serve(&options),
        "connect" => (0..options.connections).try_for_each(|_| connect(&options)),
        "echo" => echo(&options),
        "poke" => poke(&options),
        _ => Err(USAGE.to_owned()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stream: {error}");
            ExitCode::FAILURE
        }
    }
}

// ---------------------------------------------------------------- options

#[derive(Default, Clone)]
struct Options {
    address: Option<SocketAddr>,
    from: Option<SocketAddr>,
    bytes: Option<u64>,
    rounds: Option<u64>,
    seed: u64,
    size: usize,
    until_eof: bool,
    once: bool,
    epoll: bool,
    one_way: bool,
    answer_at_end: bool,
    no_trailer: bool,
    hold: bool,
    report: Option<String>,
    pause_after: Option<u64>,
    idle_after: Option<u64>,
    connections: u64,
    pace: Option<u64>,
    every: Option<Duration>,
    hex: Vec<u8>,
}

impl Options {
    fn parse(mut words: VecDeque<String>) -> Result<Self> {
        let mut o = Self { seed: 1, size: 64, connections: 1, ..Self::default() };
        while let Some(word) = words.pop_front() {
            let mut value = || words.pop_front().ok_or(format!("{word}: a value is missing"));
            match word.as_str() {
                "--bytes" => o.bytes = Some(number(&value()?)?),
                "--rounds" => o.rounds = Some(number(&value()?)?),
                "--seed" => o.seed = number(&value()?)?,
                "--size" => o.size = number(&value()?)? as usize,
                "--connections" => o.connections = number(&value()?)?,
                "--pace" => o.pace = Some(number(&value()?)?),
                "--pause-after" => o.pause_after = Some(number(&value()?)?),
                "--idle-after" => o.idle_after = Some(number(&value()?)?),
                "--every" => o.every = Some(Duration::from_millis(number(&value()?)?)),
                "--from" => o.from = Some(address(&value()?)?),
                "--report" => o.report = Some(value()?),
                "--hex" => o.hex = hex(&value()?)?,
                "--until-eof" => o.until_eof = true,
                "--once" => o.once = true,
                "--epoll" => o.epoll = true,
                "--answer-at-end" => o.answer_at_end = true,
                "--one-way" => o.one_way = true,
                "--no-trailer" => o.no_trailer = true,
                "--hold" => o.hold = true,
                _ if o.address.is_none() && !word.starts_with('-') => o.address = Some(address(&word)?),
                _ => return Err(format!("no option {word}\n{USAGE}")),
            }
        }
        Ok(o)
    }

    fn address(&self) -> Result<SocketAddr> {
        self.address.ok_or(USAGE.to_owned())
    }

    /// Whether to go on after `n` of what was asked for, unless standard input has ended.
    fn goes_on(&self, n: u64, limit: Option<u64>) -> bool {
        limit.is_none_or(|limit| n < limit)
    }

    fn open(&self) -> Result<TcpStream> {
        let address = self.address()?;
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).map_err(text)?;
        if let Some(from) = self.from {
            socket.set_reuse_address(true).map_err(text)?;
            socket.bind(&from.into()).map_err(|e| format!("bind {from}: {e}"))?;
        }
        socket.connect(&address.into()).map_err(|e| format!("connect {address}: {e}"))?;
        Ok(socket.into())
    }
}

fn number(word: &str) -> Result<u64> {
    word.parse().map_err(|_| format!("'{word}' is no number"))
}

fn address(word: &str) -> Result<SocketAddr> {
    word.parse().map_err(|_| format!("'{word}' is no ADDRESS:PORT"))
}

fn hex(word: &str) -> Result<Vec<u8>> {
    let digit = |at| word.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    (0..word.len()).step_by(2).map(|at| digit(at).ok_or(format!("'{word}' is no hex"))).collect()
}

fn text(error: io::Error) -> String {
    error.to_string()
}

/// Set when standard input ends.
fn standard_input_ends() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let theirs = ended.clone();
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        theirs.store(true, Ordering::Relaxed);
    });
    ended
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

// ---------------------------------------------------------------- what is sent

/// splitmix64: every word a function of the seed and its place.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A size of 1 B to 1 MiB: mostly small, with most of the bytes in the large ones.
    fn size(&mut self) -> usize {
        let most = match self.below(10) {
            0..=3 => 64,
            4..=6 => 1500,
            7..=8 => 64 << 10,
            _ => LARGEST as u64,
        };
        1 + self.below(most) as usize
    }
}

/// The bytes that belong to a seed, from the first on.
struct Stream {
    words: Random,
    word: [u8; 8],
    used: usize,
}

impl Stream {
    fn new(seed: u64) -> Self {
        Self { words: Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)), word: [0; 8], used: 8 }
    }

    fn fill(&mut self, mut out: &mut [u8]) {
        while !out.is_empty() {
            if self.used == 8 && out.len() >= 8 {
                let whole = out.len() & !7;
                let (now, rest) = out.split_at_mut(whole);
                for word in now.chunks_exact_mut(8) {
                    word.copy_from_slice(&self.words.next().to_le_bytes());
                }
                out = rest;
            } else {
                if self.used == 8 {
                    (self.word, self.used) = (self.words.next().to_le_bytes(), 0);
                }
                let n = out.len().min(8 - self.used);
                let (now, rest) = out.split_at_mut(n);
                now.copy_from_slice(&self.word[self.used..self.used + n]);
                self.used += n;
                out = rest;
            }
        }
    }
}

// ---------------------------------------------------------------- the protocol

/// The first bytes of a connection, by the connector.
#[derive(Clone, Copy)]
struct Hello {
    kind: u8,
    seed: u64,
    /// `u64::MAX`: until the sender ends.
    bytes: u64,
}

const ECHO: u8 = b'e';
const BOTH: u8 = b'b';
const ONE_WAY: u8 = b'o';
/// One way, and the stream just ends, without a trailer.
const UNENDED: u8 = b'u';

impl Hello {
    const LEN: usize = 20;

    fn encode(self) -> Vec<u8> {
        let mut out = vec![b's', b't', b'r', self.kind];
        out.extend(self.seed.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        out
    }

    fn read(from: &mut impl Read) -> Result<Self> {
        let mut image = [0; Self::LEN];
        from.read_exact(&mut image).map_err(|e| format!("hello: {e}"))?;
        let word = |at: usize| u64::from_le_bytes(*image[at..].first_chunk().unwrap_or(&[0; 8]));
        match &image {
            [b's', b't', b'r', kind, ..] => Ok(Self { kind: *kind, seed: word(4), bytes: word(12) }),
            _ => Err(format!("a first message that is none: {image:02x?}")),
        }
    }
}

/// How many bytes there were, and their SHA-256.
const TRAILER: usize = 8 + 32;

/// How far a call of `pump` came.
#[derive(PartialEq)]
enum Pumped {
    /// There is more to do.
    More,
    /// Everything is done.
    Done,
}

/// One direction out.
struct Sender {
    stream: Stream,
    sizes: Random,
    digest: Sha256,
    buffer: Vec<u8>,
    at: usize,
    /// Bytes of the stream made so far, those in the buffer included.
    made: u64,
    sent: u64,
    limit: u64,
    trailer: bool,
    trailed: bool,
    stop: Arc<AtomicBool>,
    report: Option<File>,
    pace: Option<(u64, Instant)>,
    /// With threads: sends nothing before the stream from the other end has ended.
    begins_at_eof: bool,
}

impl Sender {
    fn new(seed: u64, limit: u64, stop: Arc<AtomicBool>) -> Self {
        Self {
            stream: Stream::new(seed),
            sizes: Random(seed ^ 0x5eed),
            digest: Sha256::new(),
            buffer: Vec::with_capacity(LARGEST + TRAILER),
            at: 0,
            made: 0,
            sent: 0,
            limit,
            trailer: true,
            trailed: false,
            stop,
            report: None,
            pace: None,
            begins_at_eof: false,
        }
    }

    /// Makes the next piece, if one is wanted.
    fn refill(&mut self) -> Pumped {
        if self.at < self.buffer.len() {
            return Pumped::More;
        }
        self.at = 0;
        self.buffer.clear();
        let left = self.limit - self.made;
        if left == 0 || self.stop.load(Ordering::Relaxed) {
            if !self.trailer || self.trailed {
                return Pumped::Done;
            }
            self.trailed = true;
            self.buffer.extend(self.made.to_le_bytes());
            self.buffer.extend(self.digest.clone().finalize());
            return Pumped::More;
        }
        let size = (self.sizes.size() as u64).min(left) as usize;
        self.buffer.resize(size, 0);
        self.stream.fill(&mut self.buffer);
        self.digest.update(&self.buffer);
        self.made += size as u64;
        Pumped::More
    }

    fn keep_pace(&self) {
        if let Some((rate, begun)) = self.pace {
            let due = Duration::from_secs_f64(self.sent as f64 / rate as f64);
            std::thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }

    /// One write.
    fn pump(&mut self, to: &mut impl Write) -> io::Result<Pumped> {
        if self.refill() == Pumped::Done {
            return Ok(Pumped::Done);
        }
        self.keep_pace();
        let rest = &self.buffer[self.at..];
        // One in eight as a gathering write, of three pieces.
        let n = if self.sizes.below(8) == 0 && rest.len() > 2 {
            let (one, two) = rest.split_at(rest.len() / 3);
            let (two, three) = two.split_at(two.len() / 2);
            to.write_vectored(&[IoSlice::new(one), IoSlice::new(two), IoSlice::new(three)])?
        } else {
            to.write(rest)?
        };
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.at += n;
        self.sent += if self.trailed { 0 } else { n as u64 };
        if let Some(file) = &self.report {
            file.write_all_at(&self.sent.to_le_bytes(), 0)?;
        }
        Ok(Pumped::More)
    }
}

/// One direction in.
struct Receiver {
    expected: Stream,
    sizes: Random,
    digest: Sha256,
    buffer: Vec<u8>,
    own: Vec<u8>,
    /// Received, and not known to be of the stream: they may be the trailer.
    held: Vec<u8>,
    received: u64,
    limit: u64,
    trailer: bool,
}

impl Receiver {
    fn new(seed: u64, limit: u64, trailer: bool) -> Self {
        Self {
            expected: Stream::new(seed),
            sizes: Random(!seed),
            digest: Sha256::new(),
            buffer: vec![0; LARGEST],
            own: vec![0; LARGEST + TRAILER],
            held: Vec::with_capacity(LARGEST + TRAILER),
            received: 0,
            limit,
            trailer,
        }
    }

    /// One read.
    fn pump(&mut self, from: &mut impl Read) -> io::Result<Pumped> {
        let size = self.sizes.size();
        let n = if self.sizes.below(8) == 0 && size > 2 {
            let (one, two) = self.buffer[..size].split_at_mut(size / 3);
            from.read_vectored(&mut [IoSliceMut::new(one), IoSliceMut::new(two)])?
        } else {
            from.read(&mut self.buffer[..size])?
        };
        if n == 0 {
            return Ok(Pumped::Done);
        }
        self.held.extend_from_slice(&self.buffer[..n]);
        let keep = if self.trailer { TRAILER } else { 0 };
        if self.held.len() > keep {
            self.check(self.held.len() - keep)?;
        }
        Ok(Pumped::More)
    }

    /// The first `n` held bytes are of the stream.
    fn check(&mut self, n: usize) -> io::Result<()> {
        let (now, own) = (&self.held[..n], &mut self.own[..n]);
        self.expected.fill(own);
        if now != own {
            let at = now.iter().zip(&*own).position(|(a, b)| a != b).unwrap_or(0);
            let some = |bytes: &[u8]| format!("{:02x?}", &bytes[at..bytes.len().min(at + 24)]);
            let place = self.received + at as u64;
            let what = format!("byte {place} differs: got {} instead of {}", some(now), some(own));
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.digest.update(now);
        self.received += n as u64;
        self.held.drain(..n);
        Ok(())
    }

    /// The stream has ended: whether it is whole. Its digest.
    fn finish(self) -> Result<String> {
        let digest = self.digest.finalize();
        if self.trailer {
            if self.held.len() != TRAILER {
                return Err(format!("ended after {} bytes, without a trailer", self.received));
            }
            let (count, theirs) = self.held.split_at(8);
            if count != self.received.to_le_bytes() || theirs != digest.as_slice() {
                return Err(format!("{} bytes, but not those that the trailer tells of", self.received));
            }
            if self.limit != u64::MAX && self.received != self.limit {
                return Err(format!("{} bytes, want {}", self.received, self.limit));
            }
        }
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// What one direction came to, for the line at the end.
#[derive(Default)]
struct Report {
    sent: u64,
    received: u64,
    digest: String,
    error: Option<String>,
    end: &'static str,
}

impl Report {
    fn line(&self, peer: &str, kind: u8, begun: Instant) -> String {
        let error = self.error.as_ref().map_or("null".to_owned(), |e| format!("{e:?}"));
        format!(
            r#"{{"kind":"{}","peer":"{peer}","sent":{},"received":{},"sha256":"{}","end":"{}","seconds":{:.3},"error":{error}}}"#,
            kind as char,
            self.sent,
            self.received,
            self.digest,
            self.end,
            begun.elapsed().as_secs_f64()
        )
    }

    fn ended(&mut self, result: io::Result<()>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                self.end = match error.kind() {
                    io::ErrorKind::ConnectionReset => "reset",
                    io::ErrorKind::BrokenPipe => "pipe",
                    io::ErrorKind::InvalidData => "corrupt",
                    _ => "error",
                };
                self.error.get_or_insert(error.to_string());
                false
            }
        }
    }
}

// ---------------------------------------------------------------- two directions at once

/// Both directions of a connection until both have ended, in two threads or in one with an event loop.
fn exchange(
    stream: TcpStream,
    sender: Option<Sender>,
    receiver: Option<Receiver>,
    epoll: bool,
    at_eof: &AtomicBool,
) -> Report {
    let (mut sender, mut receiver) = (sender, receiver);
    let mut report = Report::default();
    let result = if epoll {
        by_events(stream, &mut sender, &mut receiver, at_eof)
    } else {
        by_threads(&stream, &mut sender, &mut receiver, at_eof)
    };
    report.sent = sender.map_or(0, |s| s.sent);
    report.end = "eof";
    report.ended(result);
    if let Some(receiver) = receiver {
        report.received = receiver.received;
        match receiver.finish() {
            Ok(digest) => report.digest = digest,
            Err(error) => drop(report.error.get_or_insert(error)),
        }
    }
    report
}

fn by_threads(
    stream: &TcpStream,
    sender: &mut Option<Sender>,
    receiver: &mut Option<Receiver>,
    at_eof: &AtomicBool,
) -> io::Result<()> {
    std::thread::scope(|scope| {
        let out = scope.spawn(|| -> io::Result<()> {
            let (Some(sender), mut to) = (sender, stream) else { return Ok(()) };
            while sender.begins_at_eof && !at_eof.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            while sender.pump(&mut to)? == Pumped::More {}
            stream.shutdown(Shutdown::Write)
        });
        let read = || -> io::Result<()> {
            let (Some(receiver), mut from) = (receiver, stream) else { return Ok(()) };
            while receiver.pump(&mut from)? == Pumped::More {}
            Ok(())
        };
        let result = read();
        at_eof.store(true, Ordering::Relaxed);
        if result.is_err() {
            // Else the other thread might write for ever to one who does not read.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let sent = out.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")));
        result.and(sent)
    })
}

fn by_events(
    stream: TcpStream,
    sender: &mut Option<Sender>,
    receiver: &mut Option<Receiver>,
    at_eof: &AtomicBool,
) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut stream = mio::net::TcpStream::from_std(stream);
    let mut poll = mio::Poll::new()?;
    let interest = mio::Interest::READABLE | mio::Interest::WRITABLE;
    poll.registry().register(&mut stream, mio::Token(0), interest)?;
    let mut events = mio::Events::with_capacity(4);
    let (mut sending, mut receiving) = (sender.is_some(), receiver.is_some());
    // Edge-triggered: each side is worked until it would block, a piece at a time. While one goes on, the other's edge is
    // looked for: a paced sender might never block, and its reader would starve.
    let (mut can_read, mut can_write) = (true, true);
    while sending || receiving {
        let idle = !(sending && can_write || receiving && can_read);
        if idle || (sending && !can_write) || (receiving && !can_read) {
            poll.poll(&mut events, (!idle).then_some(Duration::ZERO))?;
            for event in &events {
                can_read |= event.is_readable() || event.is_read_closed() || event.is_error();
                can_write |= event.is_writable() || event.is_write_closed() || event.is_error();
            }
        }
        if let (true, true, Some(receiver)) = (receiving, can_read, receiver.as_mut()) {
            match receiver.pump(&mut stream) {
                Ok(Pumped::More) => {}
                Ok(Pumped::Done) => {
                    receiving = false;
                    at_eof.store(true, Ordering::Relaxed);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => can_read = false,
                Err(e) => return Err(e),
            }
        }
        if let (true, true, Some(sender)) = (sending, can_write, sender.as_mut()) {
            match sender.pump(&mut stream) {
                Ok(Pumped::More) => {}
                Ok(Pumped::Done) => {
                    sending = false;
                    stream.shutdown(Shutdown::Write)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => can_write = false,
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- the commands

fn serve(options: &Options) -> Result<()> {
    let address = options.address()?;
    let listener = TcpListener::bind(address).map_err(|e| format!("listen at {address}: {e}"))?;
    say(&format!("listening {address}"));
    loop {
        let (stream, peer) = listener.accept().map_err(text)?;
        if options.once {
            return answer(stream, peer, options);
        }
        let options = options.clone();
        std::thread::spawn(move || {
            if let Err(error) = answer(stream, peer, &options) {
                eprintln!("stream: {peer}: {error}");
            }
        });
    }
}

fn answer(mut stream: TcpStream, peer: SocketAddr, options: &Options) -> Result<()> {
    let begun = Instant::now();
    let hello = Hello::read(&mut stream)?;
    let peer = peer.to_string();
    let mut report = Report::default();
    if hello.kind == ECHO {
        let result = return_everything(&mut stream, &mut report);
        report.ended(result);
        say(&report.line(&peer, hello.kind, begun));
        return report.error.map_or(Ok(()), Err);
    }
    let receiver = Receiver::new(hello.seed, hello.bytes, hello.kind != UNENDED);
    let at_eof = Arc::new(AtomicBool::new(false));
    let sender = (hello.kind == BOTH).then(|| {
        // An open-ended stream goes back until the one from there has ended.
        let stop = if hello.bytes == u64::MAX { at_eof.clone() } else { Arc::default() };
        let mut sender = Sender::new(hello.seed.wrapping_add(1), hello.bytes, stop);
        sender.pace = options.pace.map(|rate| (rate, begun));
        sender.begins_at_eof = options.answer_at_end;
        sender
    });
    let report = exchange(stream, sender, Some(receiver), options.epoll, &at_eof);
    say(&report.line(&peer, hello.kind, begun));
    report.error.map_or(Ok(()), Err)
}

fn return_everything(stream: &mut TcpStream, report: &mut Report) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = stream.read(&mut buffer)?;
        report.received += n as u64;
        report.end = "eof";
        if n == 0 {
            return stream.shutdown(Shutdown::Write);
        }
        stream.write_all(&buffer[..n])?;
        report.sent += n as u64;
    }
}

fn connect(options: &Options) -> Result<()> {
    if options.bytes.is_none() && !options.until_eof {
        return Err(USAGE.to_owned());
    }
    let bytes = options.bytes.unwrap_or(u64::MAX);
    let mut stream = options.open()?;
    let begun = Instant::now();
    let kind = match (options.one_way, options.no_trailer) {
        (_, true) => UNENDED,
        (true, false) => ONE_WAY,
        (false, false) => BOTH,
    };
    stream.write_all(&Hello { kind, seed: options.seed, bytes }.encode()).map_err(text)?;

    let mut sender = Sender::new(options.seed, bytes, Arc::default());
    sender.trailer = kind != UNENDED;
    sender.pace = options.pace.map(|rate| (rate, begun));
    sender.report = match &options.report {
        Some(file) => Some(File::create(file).map_err(|e| format!("{file}: {e}"))?),
        None => None,
    };
    if let Some(pause) = options.pause_after {
        sender.limit = pause.min(bytes);
        sender.trailer = false;
        while sender.pump(&mut stream).map_err(text)? == Pumped::More {}
        say("paused");
        io::stdin().read_line(&mut String::new()).map_err(text)?;
        (sender.limit, sender.trailer) = (bytes, kind != UNENDED);
    }
    if kind == UNENDED {
        while sender.pump(&mut stream).map_err(text)? == Pumped::More {}
        say(&format!("sent {}", sender.sent));
        loop {
            std::thread::park();
        }
    }
    if options.until_eof {
        sender.stop = standard_input_ends();
    }
    let receiver = (kind == BOTH).then(|| Receiver::new(options.seed.wrapping_add(1), bytes, true));
    let peer = options.address()?.to_string();
    let mut report = exchange(stream, Some(sender), receiver, options.epoll, &AtomicBool::new(false));
    if kind == ONE_WAY && report.error.is_none() {
        report.end = "sent";
    }
    say(&report.line(&peer, kind, begun));
    report.error.map_or(Ok(()), Err)
}

/// What a run of `echo` came to.
#[derive(Default)]
struct Echoed {
    rounds: u64,
    /// What each took, in microseconds.
    took: Vec<f64>,
}

fn echo(options: &Options) -> Result<()> {
    if options.rounds.is_none() && !options.until_eof {
        return Err(USAGE.to_owned());
    }
    let ended = if options.until_eof || options.idle_after.is_some() {
        standard_input_ends()
    } else {
        Arc::default()
    };
    let begun = Instant::now();
    let mut echoed = Echoed::default();
    for _ in 0..options.connections {
        echo_once(options, &ended, &mut echoed)?;
    }
    let (seconds, rounds) = (begun.elapsed().as_secs_f64(), echoed.rounds);
    echoed.took.sort_by(f64::total_cmp);
    let at = |place: usize| echoed.took.get(place).copied().unwrap_or_default();
    let (median, slowest) = (at(echoed.took.len() / 2), at(echoed.took.len().saturating_sub(1)) / 1e6);
    let bytes = rounds * options.size as u64;
    say(&format!(
        r#"{{"kind":"e","peer":"{}","rounds":{rounds},"sent":{bytes},"received":{bytes},"median_us":{median:.1},"slowest":{slowest:.6},"end":"eof","seconds":{seconds:.6},"error":null}}"#,
        options.address()?
    ));
    Ok(())
}

fn echo_once(options: &Options, ended: &AtomicBool, echoed: &mut Echoed) -> Result<()> {
    let mut stream = options.open()?;
    stream.set_nodelay(true).map_err(text)?;
    stream.write_all(&Hello { kind: ECHO, seed: options.seed, bytes: 0 }.encode()).map_err(text)?;
    let mut words = Stream::new(options.seed);
    let (mut message, mut back) = (vec![0; options.size], vec![0; options.size]);
    let mut round = 0;
    while options.goes_on(round, options.rounds) && !(options.until_eof && ended.load(Ordering::Relaxed)) {
        let started = Instant::now();
        words.fill(&mut message);
        stream.write_all(&message).map_err(|e| format!("round {round}: write: {e}"))?;
        stream.read_exact(&mut back).map_err(|e| format!("round {round}: read: {e}"))?;
        if message != back {
            return Err(format!("round {round}: the answer differs"));
        }
        round += 1;
        echoed.took.push(started.elapsed().as_secs_f64() * 1e6);
        if options.idle_after == Some(round) {
            say("idle");
            while !ended.load(Ordering::Relaxed) {
                // Parked, not asleep: a program that is idle uses no timer.
                io::copy(&mut io::stdin(), &mut io::sink()).map_err(text)?;
            }
        }
        if let Some(every) = options.every {
            std::thread::sleep(every.saturating_sub(started.elapsed()));
        }
    }
    echoed.rounds += round;
    stream.shutdown(Shutdown::Write).map_err(text)?;
    let more = stream.read(&mut back).map_err(|e| format!("end: {e}"))?;
    if more != 0 {
        return Err(format!("{more} bytes after the last answer"));
    }
    Ok(())
}

fn poke(options: &Options) -> Result<()> {
    let mut stream = options.open()?;
    stream.write_all(&options.hex).map_err(text)?;
    say("poked");
    if !options.hold {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    let end = match stream.read_to_end(&mut answer) {
        Ok(_) => "eof".to_owned(),
        Err(error) => error.to_string(),
    };
    let answer: String = answer.iter().map(|byte| format!("{byte:02x}")).collect();
    say(&format!(r#"{{"answer":"{answer}","end":"{end}"}}"#));
    Ok(())
}
