//! Many connections at once, each of which has proved worth a lane and then has little to say.
//!
//! ```text
//! crowd serve ADDR
//! crowd hold ADDR N [--message BYTES] [--rounds N] [--busy SECONDS]
//!     opens N connections, 50 at a time, asks so often in each of them (default 10 times, which is more turns of
//!     direction than a connection has to make to be opened) with so many bytes (default 64), and once more when all are
//!     there; says `open N`, waits for standard input to end, and then asks each of them once more
//!     --busy: before it waits, so long asks nothing but one connection more, and says what a round trip took, as JSON
//! ```
//!
//! A message begins with its length, and its answer is its last 64 bytes. It knows nothing of vsocket.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token};

const USAGE: &str =
    "usage: crowd serve ADDR | crowd hold ADDR N [--message BYTES] [--rounds N] [--busy SECONDS]";
const ANSWER: usize = 64;
/// The longest message.
const MOST: usize = 1 << 24;
/// Connections that are opened, or asked, at the same time: so each wake-up of either end has something to do.
const GROUP: usize = 50;
/// Round trips that do not count, before the connection is on its lane.
const WARM_UP: Duration = Duration::from_millis(500);
/// The listener's token; those of connections come after it.
const LISTENER: Token = Token(0);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve", address] => serve(address),
        ["hold", address, n, options @ ..] => {
            Options::parse(n, options).and_then(|options| hold(address, &options))
        }
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crowd: {error}");
            ExitCode::FAILURE
        }
    }
}

// ---------------------------------------------------------------- the server

/// A connection of the server, and how much of a message it has brought.
struct Guest {
    stream: mio::net::TcpStream,
    message: Vec<u8>,
}

impl Guest {
    /// Reads and answers until there is no more for now: whether the connection goes on.
    fn serve(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => return Ok(false),
                Ok(n) => self.message.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) => return Err(e),
            }
            while let Some(len) = self.whole()? {
                // So short an answer always finds room.
                self.stream.write_all(&self.message[len - ANSWER..len])?;
                self.message.drain(..len);
            }
        }
    }

    /// The length of the first message, if all of it is here.
    fn whole(&self) -> io::Result<Option<usize>> {
        let Some(head) = self.message.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_be_bytes(*head) as usize;
        if !(ANSWER..=MOST).contains(&len) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((self.message.len() >= len).then_some(len))
    }
}

fn serve(address: &str) -> io::Result<()> {
    let mut listener = TcpListener::bind(address.parse().map_err(io::Error::other)?)?;
    let mut poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(1024);
    let mut guests = HashMap::new();
    let mut last = LISTENER.0;
    let mut buffer = vec![0; 64 << 10];
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    last += 1;
                    poll.registry().register(&mut stream, Token(last), Interest::READABLE)?;
                    guests.insert(Token(last), Guest { stream, message: Vec::new() });
                }
            } else if let Some(guest) = guests.get_mut(&event.token())
                && !guest.serve(&mut buffer).unwrap_or(false)
            {
                guests.remove(&event.token());
            }
        }
    }
}

// ---------------------------------------------------------------- the client

struct Options {
    connections: usize,
    message: usize,
    rounds: usize,
    busy: Option<Duration>,
}

impl Options {
    fn parse(n: &str, words: &[&str]) -> io::Result<Self> {
        let number = |word: &str| word.parse::<usize>().map_err(io::Error::other);
        let mut options = Self { connections: number(n)?, message: ANSWER, rounds: 10, busy: None };
        for pair in words.chunks(2) {
            match *pair {
                ["--message", n] => options.message = number(n)?.clamp(ANSWER, MOST),
                ["--rounds", n] => options.rounds = number(n)?,
                ["--busy", n] => options.busy = Some(Duration::from_secs(number(n)? as u64)),
                _ => return Err(io::Error::other(USAGE)),
            }
        }
        Ok(options)
    }
}

fn hold(address: &str, options: &Options) -> io::Result<()> {
    let n = options.connections;
    let mut streams = Vec::with_capacity(n);
    while streams.len() < n {
        let (first, last) = (streams.len(), n.min(streams.len() + GROUP));
        for i in first..last {
            let named = |e: io::Error| io::Error::new(e.kind(), format!("connection {i}: {e}"));
            streams.push(connect(address).map_err(named)?);
        }
        for round in 0..options.rounds {
            ask_all(&mut streams[first..], first, options.message, round)?;
        }
    }
    // Who fell silent before the other end had opened it as well is taken up when it next speaks.
    ask_everybody(&mut streams, options)?;
    println!("open {n}");
    if let Some(time) = options.busy {
        busy(address, options.message, time)?;
    }
    io::copy(&mut io::stdin(), &mut io::sink())?;
    ask_everybody(&mut streams, options)?;
    println!("asked {n}");
    Ok(())
}

/// Asks every connection once.
fn ask_everybody(streams: &mut [TcpStream], options: &Options) -> io::Result<()> {
    for (group, streams) in streams.chunks_mut(GROUP).enumerate() {
        ask_all(streams, group * GROUP, options.message, options.rounds)?;
    }
    Ok(())
}

/// Asks some connections, of which the first has this number, at the same time.
fn ask_all(streams: &mut [TcpStream], first: usize, len: usize, round: usize) -> io::Result<()> {
    let named = |i: usize, e: io::Error| {
        io::Error::new(e.kind(), format!("connection {}, round {round}: {e}", first + i))
    };
    for (i, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&message(len, first + i + round)).map_err(|e| named(i, e))?;
    }
    for (i, stream) in streams.iter_mut().enumerate() {
        hear(stream, len, first + i + round).map_err(|e| named(i, e))?;
    }
    Ok(())
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Asks one connection all the time.
fn busy(address: &str, len: usize, time: Duration) -> io::Result<()> {
    let mut stream = connect(address)?;
    let (begin, mut took) = (Instant::now(), Vec::new());
    while begin.elapsed() < WARM_UP + time {
        let asked = Instant::now();
        stream.write_all(&message(len, took.len()))?;
        hear(&mut stream, len, took.len())?;
        if begin.elapsed() > WARM_UP {
            took.push(asked.elapsed());
        }
    }
    took.sort_unstable();
    let at = |percent: usize| took.get(took.len() * percent / 100).map_or(0.0, |t| t.as_secs_f64() * 1e6);
    let mean = took.iter().sum::<Duration>().as_secs_f64() * 1e6 / took.len().max(1) as f64;
    println!(
        "{{\"rounds\":{},\"mean_us\":{mean:.2},\"p50_us\":{:.2},\"p90_us\":{:.2},\"p99_us\":{:.2}}}",
        took.len(),
        at(50),
        at(90),
        at(99)
    );
    Ok(())
}

fn message(len: usize, seed: usize) -> Vec<u8> {
    let mut message: Vec<u8> = (0..len).map(|at| (at * 31 + seed * 7) as u8).collect();
    message[..4].copy_from_slice(&(len as u32).to_be_bytes());
    message
}

/// The answer to a message.
fn hear(stream: &mut TcpStream, len: usize, seed: usize) -> io::Result<()> {
    let mut answer = [0; ANSWER];
    stream.read_exact(&mut answer)?;
    if answer != message(len, seed)[len - ANSWER..] {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is another's"));
    }
    Ok(())
}
