//! Speed of the soft fabric beside plain TCP in the same run: one stream of WRITEs, and small SENDs.
//!
//! `cargo bench -p vsocket-backend --bench fabric [-- SECONDS [LISTEN]]`. Both ends are threads of this process; each
//! figure is the median of five rounds, taken in turn so that a change of the machine's mood hits all alike. To measure
//! between network namespaces, run `-- SECONDS serve ADDRESS` in one and `-- SECONDS dial ADDRESS` in the other.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use vsocket_backend::fabric::soft::{Options, Soft};
use vsocket_backend::fabric::{
    Access, Endpoint, Event, Fabric, LocalRange, MemoryKey, PostError, QpId, Region, RemoteAddress, Signal,
    WorkId,
};

const ROUNDS: usize = 5;
const WRITE: usize = 64 << 10;
const RING: usize = 1 << 20;

/// Sleeps on a fabric's descriptor, as the daemon does.
struct Sleeper(mio::Poll, mio::Events);

impl Sleeper {
    fn new(fabric: &Soft) -> Self {
        use std::os::fd::AsFd;
        let poll = mio::Poll::new().expect("epoll");
        let fd = fabric.as_fd().as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), mio::Token(0), mio::Interest::READABLE)
            .expect("a descriptor that can be polled");
        Self(poll, mio::Events::with_capacity(8))
    }

    fn sleep(&mut self) {
        let _ = self.0.poll(&mut self.1, Some(Duration::from_millis(100)));
    }
}

fn secret(round: u64) -> [u8; 32] {
    [round as u8 + 1; 32]
}

/// What the receiving end counts: bytes of messages, messages.
#[derive(Default)]
struct Tally {
    messages: AtomicU64,
}

/// The receiving end: expects a queue pair, tells its region, answers every message that asks, until it is closed.
fn serve(mut fabric: Soft, round: u64, tally: &Tally) -> Soft {
    let domain = fabric.open_domain();
    let ring = Region::private(RING);
    let key = fabric.register(domain, ring, Access::RemoteWrite).expect("a region");
    let (qp, _) = fabric.expect(domain, 100, secret(round), Instant::now()).expect("a secret");
    let mut sleeper = Sleeper::new(&fabric);
    loop {
        let (mut answer, mut over, mut count) = (None, false, 0);
        while let Some(event) = fabric.poll() {
            match event {
                Event::Connected { .. } => answer = Some(key_bytes(key)),
                Event::Received { payload, .. } => {
                    count += 1;
                    // Credit: how many messages have been seen in all.
                    if payload.first() == Some(&1) {
                        answer = Some([2; 16]);
                    }
                }
                Event::Disconnected { .. } => over = true,
                _ => {}
            }
        }
        tally.messages.fetch_add(count, Ordering::Relaxed);
        if let Some(bytes) = answer {
            let _ = fabric.post_send(qp, WorkId(0), &[&bytes], Signal::No);
            fabric.flush();
        }
        if over {
            fabric.close_domain(domain);
            return fabric;
        }
        sleeper.sleep();
    }
}

fn key_bytes(key: MemoryKey) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&key.rkey.to_be_bytes());
    bytes[8..].copy_from_slice(&key.base.to_be_bytes());
    bytes
}

/// The sending end, connected, with the other's region.
struct Dialled {
    fabric: Soft,
    sleeper: Sleeper,
    qp: QpId,
    local: MemoryKey,
    rkey: u32,
    base: u64,
}

fn dial(mut fabric: Soft, address: SocketAddr, round: u64) -> Dialled {
    let domain = fabric.open_domain();
    let local = fabric.register(domain, Region::private(RING), Access::Local).expect("a region");
    let offer = Endpoint::of_address(address);
    let (qp, _) = fabric.dial(domain, 100, secret(round), &offer, Instant::now()).expect("dialling");
    let mut sleeper = Sleeper::new(&fabric);
    loop {
        while let Some(event) = fabric.poll() {
            if let Event::Received { payload, .. } = event {
                let rkey = u32::from_be_bytes(payload[..4].try_into().expect("four bytes"));
                let base = u64::from_be_bytes(payload[8..16].try_into().expect("eight bytes"));
                return Dialled { fabric, sleeper, qp, local, rkey, base };
            }
        }
        sleeper.sleep();
    }
}

impl Dialled {
    /// WRITEs of 64 KiB, each with a SEND of 100 bytes as a segment's headers would be; at most a ring outstanding,
    /// as a flow would have it. Gbit/s.
    fn writes(&mut self, time: Duration) -> f64 {
        let (start, mut bytes, mut unanswered) = (Instant::now(), 0_u64, 0);
        let mut offset = 0;
        while start.elapsed() < time {
            while unanswered < RING / WRITE {
                let local = LocalRange { lkey: self.local.lkey, offset, len: WRITE };
                let remote = RemoteAddress { rkey: self.rkey, address: self.base + offset as u64 };
                self.fabric.post_write(self.qp, WorkId(0), local, remote, Signal::No).expect("room");
                // Every fourth asks for credit.
                let ask = u8::from(unanswered % 4 == 3);
                self.fabric.post_send(self.qp, WorkId(0), &[&[ask; 100]], Signal::No).expect("room");
                (offset, unanswered, bytes) = ((offset + WRITE) % RING, unanswered + 1, bytes + WRITE as u64);
            }
            self.fabric.flush();
            let mut credit = 0;
            while let Some(event) = self.fabric.poll() {
                credit += usize::from(matches!(event, Event::Received { .. }));
            }
            if credit == 0 {
                self.sleeper.sleep();
            }
            unanswered -= (credit * 4).min(unanswered);
        }
        bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
    }

    /// SENDs of 64 bytes in batches of 64, as fast as they are taken.
    fn sends(&mut self, time: Duration) -> f64 {
        let (start, mut count) = (Instant::now(), 0_u64);
        while start.elapsed() < time {
            let mut full = false;
            for _ in 0..64 {
                match self.fabric.post_send(self.qp, WorkId(count), &[&[0; 64]], Signal::No) {
                    Ok(()) => count += 1,
                    Err(PostError::Full) => {
                        full = true;
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            self.fabric.flush();
            while let Some(event) = self.fabric.poll() {
                full &= !matches!(event, Event::Room { .. });
            }
            if full {
                self.sleeper.sleep();
            }
        }
        count as f64 / start.elapsed().as_secs_f64()
    }

    /// One SEND of 64 bytes at a time, answered. Round trips per second.
    fn ping_pong(&mut self, time: Duration) -> f64 {
        let (start, mut count) = (Instant::now(), 0_u64);
        while start.elapsed() < time {
            self.fabric.post_send(self.qp, WorkId(0), &[&[1; 64]], Signal::No).expect("room");
            self.fabric.flush();
            let mut answered = false;
            while !answered {
                while let Some(event) = self.fabric.poll() {
                    answered |= matches!(event, Event::Received { .. });
                }
                if !answered {
                    self.sleeper.sleep();
                }
            }
            count += 1;
        }
        count as f64 / start.elapsed().as_secs_f64()
    }

    fn close(mut self) {
        self.fabric.close(self.qp);
        while self.fabric.poll().is_some() {}
    }
}

fn soft(address: SocketAddr) -> Soft {
    Soft::new(address, Options::default()).expect("a port")
}

/// Plain TCP with buffers of the same size. Gbit/s.
fn tcp_stream(ip: SocketAddr, time: Duration) -> f64 {
    let listener = TcpListener::bind(ip).expect("a port");
    let address = listener.local_addr().expect("an address");
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut buffer = vec![0; RING];
        while stream.read(&mut buffer).is_ok_and(|read| read > 0) {}
    });
    let mut stream = TcpStream::connect(address).expect("a connection");
    let (buffer, start, mut bytes) = (vec![7; WRITE], Instant::now(), 0_u64);
    while start.elapsed() < time {
        stream.write_all(&buffer).expect("a reader");
        bytes += buffer.len() as u64;
    }
    let rate = bytes as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9;
    drop(stream);
    reader.join().expect("the reader");
    rate
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

type Measure = fn(&mut Dialled, Duration) -> f64;

fn one_process(time: Duration) {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let (mut tcp, mut writes, mut sends, mut pings) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let tally = Arc::new(Tally::default());
    for round in 0..ROUNDS as u64 {
        tcp.push(tcp_stream(any, time));
        let kinds: [(&mut Vec<f64>, Measure); 3] =
            [(&mut writes, Dialled::writes), (&mut sends, Dialled::sends), (&mut pings, Dialled::ping_pong)];
        for (kind, (values, measure)) in kinds.into_iter().enumerate() {
            let number = round * 3 + kind as u64;
            let server = soft(any);
            let (address, theirs) = (server.address(), Arc::clone(&tally));
            let other = thread::spawn(move || serve(server, number, &theirs));
            let mut dialled = dial(soft(any), address, number);
            values.push(measure(&mut dialled, time));
            dialled.close();
            other.join().expect("the server");
        }
    }
    let (tcp, writes) = (median(tcp), median(writes));
    println!("tcp stream, 64 KiB writes     {tcp:8.1} Gbit/s");
    println!("soft WRITE 64 KiB + SEND      {writes:8.1} Gbit/s   ratio {:.2}", writes / tcp);
    println!("soft SEND 64 B, batches of 64 {:8.2} M/s", median(sends) / 1e6);
    println!("soft SEND 64 B, ping-pong     {:8.1} µs a round trip", 1e6 / median(pings));
    println!("messages received             {:8}", tally.messages.load(Ordering::Relaxed));
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let seconds = |text: &str| text.parse().map(Duration::from_secs_f64).expect("SECONDS");
    match words[..] {
        [] => one_process(Duration::from_millis(500)),
        [time] => one_process(seconds(time)),
        [time, "serve", address] => {
            let address: SocketAddr = address.parse().expect("ADDRESS");
            let tally = Tally::default();
            println!(
                "tcp stream here, for comparison: {:.1} Gbit/s",
                tcp_stream(SocketAddr::new(address.ip(), 0), seconds(time))
            );
            let fabric = serve(soft(address), 0, &tally);
            serve(fabric, 1, &tally);
        }
        [time, "dial", address] => {
            let address: SocketAddr = address.parse().expect("ADDRESS");
            let any = SocketAddr::from(([0, 0, 0, 0], 0));
            let mut dialled = dial(soft(any), address, 0);
            println!("soft WRITE 64 KiB + SEND      {:8.1} Gbit/s", dialled.writes(seconds(time)));
            dialled.close();
            thread::sleep(Duration::from_millis(200));
            let mut dialled = dial(soft(any), address, 1);
            println!("soft SEND 64 B, batches of 64 {:8.2} M/s", dialled.sends(seconds(time)) / 1e6);
            dialled.close();
        }
        _ => eprintln!("[SECONDS [serve|dial ADDRESS]]"),
    }
}
