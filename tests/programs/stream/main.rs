//! An ordinary TCP program that knows what it ought to receive: the whole-program tests run it plainly and accelerated.
//!
//! ```text
//! stream serve ADDR [--once] [--epoll]
//! stream connect ADDR --bytes N | --until-eof   [--seed S] [--one-way] [--no-trailer] [--connections N] …
//! stream echo ADDR --rounds N | --until-eof     [--seed S] [--size BYTES] [--connections N] [--idle-after N] [--spin]
//! stream poke ADDR [--hex BYTES] [--hold]
//! ```
//!
//! `connect` and `serve` send each other pseudo-random streams at the same time, in writes and reads of random size,
//! half-close, and compare what they receive byte by byte with what the seed in the connection's first message makes
//! of it, and its SHA-256 with the one that ends the stream. Each connection ends with one line of JSON on standard
//! output; the exit status is 0 only if everything was as it should be. It knows nothing of vsocket.

mod exchange;
mod options;
mod streams;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use exchange::exchange;
use options::{Options, say, standard_input_ends, text};
use streams::*;

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
    --largest BYTES   of a write
    --until-eof       sends until standard input ends
    --connections N   so many connections with as many bytes, one after the other
stream echo ADDR --rounds N | --until-eof
    --seed S --from ADDR
    --size BYTES      of a message (default 64)
    --connections N   so many connections with as many rounds, one after the other
    --idle-after N    after N rounds, says `idle` and waits for standard input to end, then goes on
    --every MS        a round no more often than that
    --spin            never sleeps: tries again at once
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
    sender.largest = options.largest.unwrap_or(sender.largest);
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

/// Asks for bytes until it gets some, also on a non-blocking socket.
struct Insistent(TcpStream);

impl Read for Insistent {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

fn echo_once(options: &Options, ended: &AtomicBool, echoed: &mut Echoed) -> Result<()> {
    let mut stream = Insistent(options.open()?);
    stream.0.set_nodelay(true).map_err(text)?;
    stream.0.set_nonblocking(options.spin).map_err(text)?;
    stream.0.write_all(&Hello { kind: ECHO, seed: options.seed, bytes: 0 }.encode()).map_err(text)?;
    let mut words = Stream::new(options.seed);
    let (mut message, mut back) = (vec![0; options.size], vec![0; options.size]);
    let mut round = 0;
    while options.goes_on(round, options.rounds) && !(options.until_eof && ended.load(Ordering::Relaxed)) {
        let started = Instant::now();
        words.fill(&mut message);
        stream.0.write_all(&message).map_err(|e| format!("round {round}: write: {e}"))?;
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
    stream.0.shutdown(Shutdown::Write).map_err(text)?;
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
