//! Connections that come and go, until the program is ended or killed: a server, and a client that opens so many a second.
//!
//! ```text
//! churn serve ADDR COUNTS [--epoll]
//! churn connect COUNTS SEED RATE [--residents N] ADDR…
//!     opens RATE connections a second, to each ADDR in turn; one in twenty moves half a MiB, the others a few small messages
//!     --residents: so many connections beside them (default 0) that stay as long as both programs do, and talk all the time
//! ```
//!
//! Either ends when its standard input does. COUNTS is a file of numbers, which are right at every moment, also when the
//! program is killed: a line of `LINE` of them for each thread, in the order of `Count`; who finds the file goes on counting.
//! Every byte is checked, and every wait is bounded. It knows nothing of vsocket.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use std::collections::HashMap;

const USAGE: &str = "usage: churn serve ADDR COUNTS [--epoll]
       churn connect COUNTS SEED RATE [--residents N] ADDR…";
/// Who hears nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that the server serves at the same time; the client has fewer.
const SERVERS: usize = 24;
/// Threads of the client that open one connection after the other.
const CLIENTS: usize = 8;
/// Numbers of a thread.
const LINE: usize = 8;
/// Length of what is sent, length of the answer, and the seed of both.
const HEAD: usize = 16;
const MOST: usize = 1 << 20;

/// What is counted, by its place in a thread's line.
#[derive(Clone, Copy)]
enum Count {
    /// Begun.
    Begun,
    /// Ended as it was to.
    Whole,
    /// Of these, long ones.
    Long,
    /// Nobody listened.
    Refused,
    /// Ended by the other side before that, as by its death.
    Cut,
    /// Nothing was heard for [`PATIENCE`].
    Late,
    /// Anything else: bytes that are others', or an error that is none of these.
    Wrong,
    /// Microseconds of the longest wait for a connection or an answer.
    Longest,
}

/// A thread's line.
struct Tally {
    file: Arc<File>,
    at: u64,
    counts: [u64; LINE],
}

impl Tally {
    fn open(path: &str) -> io::Result<Arc<File>> {
        let options = || File::options().read(true).write(true).create(true).truncate(false).clone();
        options().open(path).map(Arc::new)
    }

    fn of(file: &Arc<File>, thread: usize) -> Self {
        let at = (thread * LINE * 8) as u64;
        let (mut counts, mut bytes) = ([0; LINE], [0; LINE * 8]);
        if file.read_exact_at(&mut bytes, at).is_ok() {
            for (count, bytes) in counts.iter_mut().zip(bytes.as_chunks().0) {
                *count = u64::from_le_bytes(*bytes);
            }
        }
        Self { file: file.clone(), at, counts }
    }

    fn add(&mut self, what: Count) {
        self.counts[what as usize] += 1;
        self.write();
    }

    fn took(&mut self, since: Instant) {
        let longest = &mut self.counts[Count::Longest as usize];
        *longest = (*longest).max(since.elapsed().as_micros() as u64);
    }

    fn write(&self) {
        let bytes: Vec<u8> = self.counts.iter().flat_map(|n| n.to_le_bytes()).collect();
        if let Err(error) = self.file.write_all_at(&bytes, self.at) {
            eprintln!("churn: counts: {error}");
        }
    }

    /// How a connection ended.
    fn ended(&mut self, how: &io::Result<()>) {
        let what = match how.as_ref().map_err(io::Error::kind) {
            Ok(()) => Count::Whole,
            Err(ErrorKind::ConnectionRefused) => Count::Refused,
            Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof) => Count::Cut,
            Err(ErrorKind::ConnectionAborted | ErrorKind::NotConnected) => Count::Cut,
            Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => Count::Late,
            Err(_) => Count::Wrong,
        };
        if let (Count::Late | Count::Wrong, Err(error)) = (what, how) {
            eprintln!("churn: {error}");
        }
        self.add(what);
    }
}

/// The bytes of a seed.
fn bytes_of(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn foreign(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("{what} that was not sent"))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve", address, counts] => serve(address, counts),
        ["serve", address, counts, "--epoll"] => serve_by_epoll(address, counts),
        ["connect", counts, seed, rate, rest @ ..] => connect(counts, seed, rate, rest),
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("churn: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(word: &str) -> io::Result<u64> {
    word.parse().map_err(|_| io::Error::other(format!("'{word}' is no number")))
}

fn address(word: &str) -> io::Result<SocketAddr> {
    word.parse().map_err(|_| io::Error::other(format!("'{word}' is no address")))
}

// ---------------------------------------------------------------- the server

/// What a head asks for.
struct Request {
    len: usize,
    answer: usize,
    seed: u64,
}

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.len);
        bytes.extend_from_slice(&(self.len as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.answer as u32).to_le_bytes());
        bytes.extend_from_slice(&self.seed.to_le_bytes());
        bytes.extend(bytes_of(self.seed, self.len));
        bytes
    }

    fn of(head: [u8; HEAD]) -> io::Result<Self> {
        let word = |at: usize| head[at..at + 4].iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte));
        let (len, answer, seed) = (word(0), word(4), word(8) as u64 | (word(12) as u64) << 32);
        if len > MOST || answer > MOST { Err(foreign("a head")) } else { Ok(Self { len, answer, seed }) }
    }

    fn answer_to(&self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        if bytes == bytes_of(self.seed, self.len) {
            Ok(bytes_of(!self.seed, self.answer))
        } else {
            Err(foreign("a request"))
        }
    }
}

/// Ends the program when its standard input does.
fn end_with_input() {
    thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::exit(0);
    });
}

fn serve(to: &str, counts: &str) -> io::Result<()> {
    let (listener, file) = (Arc::new(TcpListener::bind(address(to)?)?), Tally::open(counts)?);
    end_with_input();
    let threads: Vec<_> = (0..SERVERS)
        .map(|n| {
            let (listener, mut tally) = (listener.clone(), Tally::of(&file, n));
            thread::spawn(move || {
                loop {
                    let Ok((stream, _)) = listener.accept() else { continue };
                    tally.add(Count::Begun);
                    let how = serve_one(&stream);
                    tally.ended(&how);
                }
            })
        })
        .collect();
    threads.into_iter().try_for_each(|t| t.join().map_err(|_| io::Error::other("a thread has panicked")))
}

fn serve_one(mut stream: &TcpStream) -> io::Result<()> {
    bounded(stream)?;
    let mut head = [0; HEAD];
    // The end of the stream is right between two requests.
    while stream.read(&mut head[..1])? == 1 {
        stream.read_exact(&mut head[1..])?;
        let request = Request::of(head)?;
        let mut bytes = vec![0; request.len];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&request.answer_to(&bytes)?)?;
    }
    Ok(())
}

fn bounded(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// A connection of the server with one thread.
struct Guest {
    stream: mio::net::TcpStream,
    came: Vec<u8>,
    goes: Vec<u8>,
}

impl Guest {
    /// Does what can be done now; true is the end of the connection.
    fn go_on(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        loop {
            while !self.goes.is_empty() {
                match self.stream.write(&self.goes) {
                    Ok(n) => drop(self.goes.drain(..n)),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                    Err(e) => return Err(e),
                }
            }
            match self.stream.read(buffer) {
                Ok(0) if self.came.is_empty() => return Ok(true),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.came.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
            self.answer()?;
        }
    }

    fn answer(&mut self) -> io::Result<()> {
        while let Some(head) = self.came.first_chunk() {
            let request = Request::of(*head)?;
            let Some(bytes) = self.came.get(HEAD..HEAD + request.len) else { break };
            self.goes.extend(request.answer_to(bytes)?);
            self.came.drain(..HEAD + request.len);
        }
        Ok(())
    }
}

fn serve_by_epoll(to: &str, counts: &str) -> io::Result<()> {
    const LISTENER: Token = Token(0);
    let mut listener = mio::net::TcpListener::bind(address(to)?)?;
    let mut tally = Tally::of(&Tally::open(counts)?, 0);
    end_with_input();
    let mut poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let (mut events, mut guests) = (Events::with_capacity(256), HashMap::new());
    let (mut last, mut buffer) = (0, vec![0; 64 << 10]);
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    last += 1;
                    tally.add(Count::Begun);
                    let _ = stream.set_nodelay(true);
                    let both = Interest::READABLE | Interest::WRITABLE;
                    poll.registry().register(&mut stream, Token(last), both)?;
                    guests.insert(Token(last), Guest { stream, came: Vec::new(), goes: Vec::new() });
                }
            } else if let Some(guest) = guests.get_mut(&event.token()) {
                let how = match guest.go_on(&mut buffer) {
                    Ok(false) => continue,
                    Ok(true) => Ok(()),
                    Err(error) => Err(error),
                };
                tally.ended(&how);
                guests.remove(&event.token());
            }
        }
    }
}

// ---------------------------------------------------------------- the client

fn connect(counts: &str, seed: &str, rate: &str, rest: &[&str]) -> io::Result<()> {
    let (file, seed, rate) = (Tally::open(counts)?, number(seed)?, number(rate)?.max(1));
    let (residents, words) = match rest {
        ["--residents", n, words @ ..] => (number(n)? as usize, words),
        words => (0, words),
    };
    let to: Vec<SocketAddr> = words.iter().map(|word| address(word)).collect::<io::Result<_>>()?;
    if to.is_empty() {
        return Err(io::Error::other(USAGE));
    }
    let ended = Arc::new(AtomicBool::new(false));
    let pause = Duration::from_secs(CLIENTS as u64).div_f64(rate as f64);
    let threads: Vec<_> = (0..CLIENTS + residents)
        .map(|n| {
            let seed = seed.wrapping_mul(1000).wrapping_add(n as u64);
            let thread = Client { to: to.clone(), tally: Tally::of(&file, n), seed, ended: ended.clone() };
            let first = pause.mul_f64(n as f64 / CLIENTS as f64);
            thread::spawn(move || if n < CLIENTS { thread.come_and_go(first, pause) } else { thread.stay() })
        })
        .collect();
    io::copy(&mut io::stdin(), &mut io::sink())?;
    ended.store(true, Ordering::Relaxed);
    threads.into_iter().try_for_each(|t| t.join().map_err(|_| io::Error::other("a thread has panicked")))
}

struct Client {
    to: Vec<SocketAddr>,
    tally: Tally,
    seed: u64,
    ended: Arc<AtomicBool>,
}

impl Client {
    fn goes_on(&self) -> bool {
        !self.ended.load(Ordering::Relaxed)
    }

    /// Opens a connection every so often, and makes up for a tenth of a second at most.
    fn come_and_go(mut self, first: Duration, pause: Duration) {
        let mut due = Instant::now() + first;
        for n in self.seed.. {
            if !self.goes_on() {
                return;
            }
            thread::sleep(due.saturating_duration_since(Instant::now()));
            due = due.max(Instant::now().checked_sub(Duration::from_millis(100)).unwrap_or(due)) + pause;
            self.tally.add(Count::Begun);
            let long = n % 20 == 0;
            let how = self.exchange(n as usize, if long { 32 } else { 3 }, if long { 16 << 10 } else { 64 });
            self.tally.ended(&how);
            if long && how.is_ok() {
                self.tally.add(Count::Long);
            }
        }
    }

    fn exchange(&mut self, n: usize, rounds: u64, len: usize) -> io::Result<()> {
        let stream = self.open(n)?;
        (0..rounds).try_for_each(|round| self.ask(&stream, len, len, (n as u64) << 16 | round))?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut beyond = [0];
        if (&stream).read(&mut beyond)? > 0 { Err(foreign("an answer")) } else { Ok(()) }
    }

    fn open(&mut self, n: usize) -> io::Result<TcpStream> {
        let begun = Instant::now();
        let stream = TcpStream::connect_timeout(&self.to[n % self.to.len()], PATIENCE)?;
        self.tally.took(begun);
        bounded(&stream)?;
        Ok(stream)
    }

    fn ask(&mut self, mut stream: &TcpStream, len: usize, answer: usize, seed: u64) -> io::Result<()> {
        let (begun, request) = (Instant::now(), Request { len, answer, seed });
        stream.write_all(&request.bytes())?;
        let mut bytes = vec![0; answer];
        stream.read_exact(&mut bytes)?;
        self.tally.took(begun);
        if bytes == bytes_of(!seed, answer) { Ok(()) } else { Err(foreign("an answer")) }
    }

    /// Talks on one connection until it ends, and then on another.
    fn stay(mut self) {
        for n in self.seed as usize.. {
            if !self.goes_on() {
                return;
            }
            self.tally.add(Count::Begun);
            let how = self.talk(n);
            self.tally.ended(&how);
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn talk(&mut self, n: usize) -> io::Result<()> {
        let stream = self.open(n)?;
        let mut round = 0;
        while self.goes_on() {
            let (len, answer) = [(64, 64), (40_000, 64), (64, 40_000)][round % 3];
            self.ask(&stream, len, answer, (n << 20 | round) as u64)?;
            round += 1;
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}
