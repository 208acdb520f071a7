//! A guest that lies, in a virtual machine: as one of its containers, and with all that its root has. For scripts/vmguests.py.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use vsocket_channel::layout::Geometry;
use vsocket_channel::message::{MESSAGE_LEN, Message, RUNS, Runs, Tuple};

const USAGE: &str = "usage: hostile register PORT FROM            as a container that knows no token: register from this port
       hostile memory PORT TOKEN-FILE PEER     with the keeper's token, which has ended: tell of memory that is none, once for each
                                               connection to PEER, a redis-server in another guest
       hostile flood PORT SECONDS SEED         streams to all ports, with messages that nobody has made sense of";
/// Of the host.
const CID: u32 = 2;
const PAGE: u64 = 4096;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["register", port, from] => number(port).and_then(|port| register(port, number(from)?)),
        ["memory", port, token, peer] => number(port).and_then(|port| memory(port, token, peer)),
        ["flood", port, seconds, seed] => {
            number(port).and_then(|port| flood(port, number(seconds)?, number(seed)?))
        }
        _ => Err(io::Error::other(USAGE)),
    };
    match result {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("hostile: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(word: &str) -> io::Result<u32> {
    word.parse().map_err(|_| io::Error::other(format!("'{word}' is no number")))
}

/// A stream to the host.
struct Stream {
    socket: Socket,
    /// Of a message that has not come whole.
    held: Vec<u8>,
}

impl Stream {
    fn open(port: u32, from: u32) -> io::Result<Self> {
        let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        // Any CID: the guest's own.
        socket.bind(&SockAddr::vsock(u32::MAX, from))?;
        socket.connect(&SockAddr::vsock(CID, port))?;
        Ok(Self { socket, held: Vec::new() })
    }

    /// From a port that only root has.
    fn privileged(port: u32) -> io::Result<Self> {
        // The end of a stream that had the port before may still be under way, and ends this one.
        let mut resets = 0..3;
        let mut taken = |error: &io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => true,
            io::ErrorKind::ConnectionReset => resets.next().is_some(),
            _ => false,
        };
        (512..1023)
            .rev()
            .map(|from| Self::open(port, from))
            .find(|one| !one.as_ref().is_err_and(&mut taken))
            .unwrap_or_else(|| Err(io::Error::other("no privileged port is free")))
    }

    fn send(&self, message: Message) -> io::Result<()> {
        (&self.socket).write_all(&message.encode())
    }

    /// The next message, if one comes within that time.
    fn receive(&mut self, time: Duration) -> io::Result<Option<Message>> {
        self.socket.set_read_timeout(Some(time))?;
        loop {
            if let Some((image, rest)) = self.held.split_first_chunk::<MESSAGE_LEN>() {
                let message = Message::decode(image).map_err(io::Error::other)?;
                self.held = rest.to_vec();
                return Ok(Some(message));
            }
            let mut bytes = [0; 4096];
            match (&self.socket).read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => self.held.extend_from_slice(&bytes[..len]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The host has ended it, within that time.
    fn ends(&mut self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if self.receive(Duration::from_millis(50)).is_err() {
                return true;
            }
        }
        false
    }
}

fn register(port: u32, from: u32) -> io::Result<String> {
    let mut stream = Stream::open(port, from)?;
    stream.send(Message::Register { token: 0, pid: std::process::id() })?;
    match stream.receive(Duration::from_secs(5)) {
        Ok(Some(Message::Registered { .. })) => Err(io::Error::other("registered")),
        Ok(Some(other)) => Err(io::Error::other(format!("answered: {other:?}"))),
        Ok(None) => Err(io::Error::other("neither answered nor turned away")),
        Err(error) => Ok(format!("turned away: {error}")),
    }
}

// ---------------------------------------------------------------- memory that is none

/// What the keeper says when it is asked for a slab: the slab, its pages and memory of this process to make up the answer.
type Lie = fn(u64, &[u64]) -> Vec<[u8; MESSAGE_LEN]>;

const LIES: &[(&str, Lie)] = &[
    ("page 0", |slab, pages| told(slab, 0, &with(pages, 3, 0))),
    ("beyond all memory", |slab, pages| told(slab, 0, &with(pages, 3, (1 << 47) - 1))),
    ("behind the RAM's end", |slab, pages| told(slab, 0, &with(pages, 3, (2 << 30) / PAGE))),
    ("a device's registers", |slab, pages| told(slab, 0, &with(pages, 3, 0xfee0_0000 / PAGE))),
    ("out of the RAM and on", |slab, _| vec![image(slab, 0, &[(100, 0xffff); RUNS])]),
    ("a page twice", |slab, pages| told(slab, 0, &with(pages, 3, pages[1]))),
    ("one page for all", |slab, pages| told(slab, 0, &vec![pages[0]; pages.len()])),
    ("more than were wanted", |slab, pages| told(slab, 0, &[pages, pages].concat())),
    ("not from the first on", |slab, pages| told(slab, 7, pages)),
    ("for a slab that nobody wanted", |slab, pages| told(slab + 1, 0, pages)),
    ("the same slab again", |slab, pages| [told(slab, 0, pages), told(slab, 0, pages)].concat()),
    ("nothing at all", |_, _| Vec::new()),
    ("noise", |slab, _| noise(slab).take(50).collect()),
];

fn with(pages: &[u64], at: usize, page: u64) -> Vec<u64> {
    let mut pages = pages.to_vec();
    pages[at] = page;
    pages
}

/// These pages, message by message; each a run of its own.
fn told(slab: u64, first: usize, pages: &[u64]) -> Vec<[u8; MESSAGE_LEN]> {
    let message = |(n, some): (usize, &[u64])| {
        let runs: Vec<_> = some.iter().map(|&page| (page, 1)).collect();
        image(slab, (first + n * RUNS) as u32, &runs)
    };
    pages.chunks(RUNS).enumerate().map(message).collect()
}

/// What no honest keeper could encode.
fn image(slab: u64, first: u32, runs: &[(u64, u64)]) -> [u8; MESSAGE_LEN] {
    let (good, _) = Runs::of(&[1]).unwrap_or_else(|| unreachable!("a page"));
    let mut image = Message::SlabPages { slab, first, runs: good }.encode();
    for (n, (page, count)) in runs.iter().enumerate() {
        image[20 + 8 * n..28 + 8 * n].copy_from_slice(&(page << 16 | count).to_le_bytes());
    }
    image
}

/// Messages with a good head and anything behind it.
fn noise(seed: u64) -> impl Iterator<Item = [u8; MESSAGE_LEN]> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(move || {
        let mut image = Message::Ping { n: 0 }.encode();
        let kinds = if next() % 2 == 0 { 50..60 } else { 1..60 };
        let kind = (kinds.start + next() % (kinds.end - kinds.start)) as u16;
        image[6..8].copy_from_slice(&kind.to_le_bytes());
        let mask = [0, 0xff, 0xffff, u64::MAX][next() as usize % 4];
        for word in image[8..].chunks_exact_mut(8) {
            word.copy_from_slice(&(next() & mask).to_le_bytes());
        }
        image
    })
}

/// Page numbers of memory of this process.
fn own_pages(memory: &[u8]) -> io::Result<Vec<u64>> {
    let map = File::open("/proc/self/pagemap")?;
    let start = (memory.as_ptr() as u64).div_ceil(PAGE);
    (0..memory.len() as u64 / PAGE - 1)
        .map(|n| {
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, (start + n) * 8)?;
            Ok(u64::from_le_bytes(entry) & ((1 << 55) - 1))
        })
        .collect()
}

fn memory(port: u32, token_file: &str, peer: &str) -> io::Result<String> {
    let mut token = read_token(token_file)?;
    let mut asked = 0;
    for &(name, lie) in LIES {
        let mut keeper = Stream::privileged(port)?;
        keeper.send(Message::Register { token, pid: std::process::id() })?;
        let second = Duration::from_secs(1);
        match keeper.receive(5 * second)? {
            Some(Message::Registered { token: new, .. }) => token = new,
            other => return Err(io::Error::other(format!("not registered: {other:?}"))),
        }
        let mut agent = Stream::privileged(port)?;
        agent.send(Message::Present { token, program: 0, bell: 0 })?;
        agent.send(Message::Hello { pid: std::process::id() })?;
        match agent.receive(5 * second)? {
            Some(Message::Welcome { .. }) => {}
            other => return Err(io::Error::other(format!("no welcome: {other:?}"))),
        }
        let client = TcpStream::connect(peer)?;
        client.set_read_timeout(Some(5 * second))?;
        let tuple = Tuple::new(client.local_addr()?, client.peer_addr()?);
        agent.send(Message::Open { conn: 1, program: 1, tuple, min_generation: 1 })?;
        let Some((slab, geometry)) = wanted(&mut keeper, &client)? else {
            println!("{name}: not asked for memory");
            continue;
        };
        asked += 1;
        let count = geometry.slab_len().div_ceil(PAGE as usize);
        let mut bytes = vec![0u8; (count + 2) * PAGE as usize];
        bytes.iter_mut().step_by(PAGE as usize).for_each(|byte| *byte = 1);
        let pages = own_pages(&bytes)?;
        let sent = lie(slab, &pages[..count]).iter().try_for_each(|image| (&keeper.socket).write_all(image));
        let ended = sent.is_err() || keeper.ends(second / 2);
        // On TCP, whatever came of the lie.
        turns(&client, 20)?;
        println!("{name}: {}", if ended { "the stream is ended" } else { "the stream goes on" });
        // What the host believes to have stays until it can have noticed the end.
        drop((keeper, agent, client));
        thread::sleep(second / 5);
        drop(bytes);
    }
    if asked == 0 {
        return Err(io::Error::other("the host never wanted memory"));
    }
    Ok(format!("lied {asked} times"))
}

fn read_token(file: &str) -> io::Result<u128> {
    let bytes = std::fs::read(file)?;
    if let Ok(bytes) = <[u8; 16]>::try_from(&bytes[..]) {
        return Ok(u128::from_le_bytes(bytes));
    }
    let text = String::from_utf8_lossy(&bytes);
    u128::from_str_radix(text.trim().trim_start_matches("0x"), 16).map_err(io::Error::other)
}

/// Makes a connection prove its worth to the other end, until the host wants memory for it.
fn wanted(keeper: &mut Stream, client: &TcpStream) -> io::Result<Option<(u64, Geometry)>> {
    for _ in 0..100 {
        turns(client, 10)?;
        if let Some(Message::SlabWanted { slab, geometry, .. }) = keeper.receive(Duration::from_millis(20))? {
            return Ok(Some((slab, geometry)));
        }
    }
    Ok(None)
}

fn turns(mut client: &TcpStream, count: usize) -> io::Result<()> {
    for _ in 0..count {
        client.write_all(b"PING\r\n")?;
        let mut answer = [0; 7];
        client.read_exact(&mut answer)?;
        if &answer != b"+PONG\r\n" {
            return Err(io::Error::other(format!("the other guest answers {answer:?}")));
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- noise

fn flood(port: u32, seconds: u32, seed: u32) -> io::Result<String> {
    let end = Instant::now() + Duration::from_secs(seconds.into());
    let threads: Vec<_> =
        (0..4).map(|n| thread::spawn(move || flood_until(end, port, seed * 4 + n))).collect();
    let [mut opened, mut refused, mut sent] = [0; 3];
    for thread in threads {
        let counts = thread.join().map_err(|_| io::Error::other("a thread panicked"))?;
        opened += counts[0];
        refused += counts[1];
        sent += counts[2];
    }
    Ok(format!("{opened} streams, {sent} messages, {refused} refused"))
}

fn flood_until(end: Instant, port: u32, seed: u32) -> [u64; 3] {
    let [mut opened, mut refused, mut sent] = [0; 3];
    let mut held = Vec::new();
    let mut messages = noise(u64::from(seed) + 1);
    while Instant::now() < end {
        let Some(choice) =
            messages.next().map(|image| u32::from_le_bytes([image[16], image[17], image[24], image[25]]))
        else {
            break;
        };
        let to = if choice % 8 == 0 { choice } else { port };
        let stream = if choice % 3 == 0 { Stream::privileged(to) } else { Stream::open(to, u32::MAX) };
        let Ok(stream) = stream else {
            refused += 1;
            continue;
        };
        opened += 1;
        // One that does not read must not stop this program.
        let _ = stream.socket.set_write_timeout(Some(Duration::from_millis(200)));
        for image in messages.by_ref().take(choice as usize % 40) {
            let len = if choice % 5 == 0 { MESSAGE_LEN / 3 } else { MESSAGE_LEN };
            if (&stream.socket).write_all(&image[..len]).is_err() {
                break;
            }
            sent += 1;
        }
        if choice % 4 == 0 {
            held.push(stream);
        }
        if held.len() == 100 {
            held.clear();
        }
    }
    [opened, refused, sent]
}
