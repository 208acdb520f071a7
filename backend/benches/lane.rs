//! The fabric lane end to end, from ring to ring through two daemons in this process over loopback TCP: 64-byte
//! ping-pong, one stream, and many small connections' worth of messages. `cargo bench -p vsocket-backend --bench lane`

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{Agent, Dir, End, Running, Switch, pair, soft, two_hosts_with};

/// What must live as long as the lane.
struct Lab {
    agent: Agent,
    _far: Agent,
    _hosts: (Running, Running, Switch),
    _dir: Dir,
}

fn ends() -> (Lab, End, End) {
    let dir = Dir::new();
    let hosts = two_hosts_with(&dir, 1 << 20, [soft(), soft()]);
    let (a, c) = (Agent::new(&dir.0.join("a")), Agent::new(&dir.0.join("c")));
    let (ours, theirs) = pair(&a, &c, 1, ["198.51.100.1:4000", "198.51.100.3:80"], 1);
    let (one, two) = (End::new(ours, 1), End::new(theirs, 1));
    (Lab { agent: a, _far: c, _hosts: hosts, _dir: dir }, one, two)
}

fn read(end: &mut End, len: usize, into: &mut [u8]) {
    let mut got = 0;
    while got < len {
        let n = end.read_into(&mut into[..len - got]);
        got += n;
        if n == 0 {
            std::thread::yield_now();
        }
    }
}

fn ping_pong(rounds: usize) {
    let (_lab, mut one, mut two) = ends();
    let mut times = Vec::with_capacity(rounds);
    std::thread::scope(|s| {
        s.spawn(move || {
            let mut buffer = [0; 64];
            for _ in 0..rounds {
                read(&mut two, 64, &mut buffer);
                two.write(&buffer);
            }
        });
        let mut buffer = [7; 64];
        for _ in 0..rounds {
            let begin = Instant::now();
            one.write(&buffer);
            read(&mut one, 64, &mut buffer);
            times.push(begin.elapsed());
        }
    });
    times.sort();
    let at = |p: usize| times[times.len() * p / 100] / 2;
    println!("ping-pong 64 B, one way: p50 {:?}, p90 {:?}, p99 {:?}", at(50), at(90), at(99));
}

fn stream(total: usize, chunk: usize) {
    let (lab, mut one, mut two) = ends();
    let begin = Instant::now();
    std::thread::scope(|s| {
        s.spawn(move || {
            let data = vec![5; chunk];
            let mut sent = 0;
            while sent < total {
                let n = one.write(&data[..chunk.min(total - sent)]);
                sent += n;
                if n == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let (mut got, mut buffer, mut last) = (0, vec![0; 128 << 10], Instant::now());
        while got < total {
            let n = two.read_into(&mut buffer);
            got += n;
            if n > 0 {
                last = Instant::now();
            }
            assert!(last.elapsed() < Duration::from_secs(10), "stalled at {got}: {:?}", lab.agent.hear());
            if n == 0 {
                std::thread::yield_now();
            }
        }
    });
    let took: Duration = begin.elapsed();
    let gbits = total as f64 * 8.0 / took.as_secs_f64() / 1e9;
    println!("stream of {chunk} B writes: {gbits:.2} Gbit/s");
}

fn main() {
    for _ in 0..3 {
        ping_pong(20_000);
        stream(1 << 30, 128 << 10);
        stream(64 << 20, 256);
    }
}
