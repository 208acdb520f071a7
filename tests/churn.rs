//! Programs that come and go, and are killed: what agents and backends keep for them goes with them.
//!
//! `CHURN_SECONDS` is how long they do so (default 4; `scripts/test churn`: 300), `CHURN_RATE` how many connections are opened a
//! second (default 1000), `CHURN_SEED` decides who is killed, and when.

mod common;

use common::{Lab, Path, Program, example, v4};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Ports of the server with a thread for each connection, and of the one with a thread for all.
const PORTS: [u16; 2] = [7000, 7001];
/// Connections of each of the two clients that stay as long as both ends live.
const RESIDENTS: u64 = 2;
/// Without anybody being killed: what the kernel reaches, and what we do.
const CALM: Duration = Duration::from_secs(1);
/// So long programs come and go before the counts are taken that the end is compared with: the daemons' heaps and tables have
/// their size then.
const WARM_UP: Duration = Duration::from_secs(2);
/// Who has opened no connection to its end for so long hangs: twice as long as the programs wait.
const STUCK: Duration = Duration::from_secs(20);
/// By then everything that has ended is over.
const SETTLED: Duration = Duration::from_secs(30);
/// How much more memory of its own a daemon may have after the churn than before, in kB: what the allocator keeps of a burst that
/// was larger than those before. It does not grow with the time, so in five minutes a few bytes per connection would be seen.
const KEPT: u64 = 2 << 10;
/// How often a client finds its connection cut, at most, when a server is killed: each of its threads once, and once more if
/// it has caught the server at its end.
const CUTS: u64 = 2 * 2 * (8 + RESIDENTS);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// Small numbers that a seed decides.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

// ---------------------------------------------------------------- the programs

/// What a program has counted, over all its lives.
#[derive(Clone, Copy, Default, Debug)]
struct Counts {
    begun: u64,
    whole: u64,
    long: u64,
    refused: u64,
    cut: u64,
    late: u64,
    wrong: u64,
    longest: Duration,
}

impl Counts {
    fn of(file: &PathBuf) -> Self {
        let bytes = fs::read(file).unwrap_or_default();
        let words: Vec<u64> = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let mut counts = Self::default();
        for line in words.as_chunks().0 {
            let [begun, whole, long, refused, cut, late, wrong, longest] = *line;
            let one = Self {
                begun,
                whole,
                long,
                refused,
                cut,
                late,
                wrong,
                longest: Duration::from_micros(longest),
            };
            counts = counts.and(one);
        }
        counts
    }

    /// Bytes of the connections that came to their good end, both ways: what `churn connect` asks for and checks.
    fn bytes(&self) -> u64 {
        self.long * 32 * 2 * (16 << 10) + (self.whole - self.long) * 3 * 2 * 64
    }

    fn and(self, other: Self) -> Self {
        Self {
            begun: self.begun + other.begun,
            whole: self.whole + other.whole,
            long: self.long + other.long,
            refused: self.refused + other.refused,
            cut: self.cut + other.cut,
            late: self.late + other.late,
            wrong: self.wrong + other.wrong,
            longest: self.longest.max(other.longest),
        }
    }
}

/// Two servers in one guest, and two clients in another.
struct Crowd<'a> {
    lab: &'a Lab,
    /// `run` or `exec`.
    verb: &'static str,
    path: Path,
    rate: u64,
    /// Servers, then clients.
    programs: Vec<Program>,
    files: Vec<PathBuf>,
}

impl<'a> Crowd<'a> {
    fn new(lab: &'a Lab, verb: &'static str, path: Path, rate: u64, name: &str) -> Self {
        let files = ["s0", "s1", "c0", "c1"].map(|p| lab.state().join(format!("{name}.{p}"))).to_vec();
        let mut crowd = Self { lab, verb, path, rate, programs: Vec::new(), files };
        crowd.programs = (0..4).map(|n| crowd.start(n)).collect();
        crowd
    }

    fn start(&self, n: usize) -> Program {
        let (program, counts) = (example("churn"), self.files[n].to_str().expect("a path in UTF-8"));
        let to = PORTS.map(|port| v4(self.path.server(), port).to_string());
        if n < 2 {
            let mut command = vec![program.as_str(), "serve", &to[n], counts];
            command.extend(["--epoll"].iter().filter(|_| n == 1));
            return self.lab.serve_by(self.verb, self.path.server(), PORTS[n], &command);
        }
        let (seed, rate, residents) = (n.to_string(), (self.rate / 2).to_string(), RESIDENTS.to_string());
        let options = [&seed, &rate, "--residents", &residents, &to[0], &to[1]];
        self.lab.start(self.verb, "a", &[&[program.as_str(), "connect", counts], &options[..]].concat())
    }

    fn counts(&self, of: std::ops::Range<usize>) -> Counts {
        self.files[of].iter().map(Counts::of).fold(Counts::default(), Counts::and)
    }

    fn clients(&self) -> Counts {
        self.counts(2..4)
    }

    /// Connections that came to their good end, a second, in so long a time.
    fn rate_in(&self, time: Duration) -> f64 {
        let (before, begun) = (self.clients().whole, Instant::now());
        std::thread::sleep(time);
        (self.clients().whole - before) as f64 / begun.elapsed().as_secs_f64()
    }

    /// All of them end by themselves: the clients when they have ended their connections. What each has counted.
    fn end(mut self) -> Counts {
        let (servers, counts) = (self.programs.drain(..2).collect::<Vec<_>>(), self.files.clone());
        for mut client in self.programs.drain(..) {
            client.end_input();
            let ended = client.ends(STUCK);
            assert_eq!(ended.err, "");
            ended.ok();
        }
        for mut server in servers {
            server.end_input();
            let ended = server.ends(STUCK);
            assert_eq!(ended.err, "");
            ended.ok();
        }
        let all = counts.iter().map(Counts::of).fold(Counts::default(), Counts::and);
        assert_eq!((all.late, all.wrong), (0, 0), "{all:?}");
        counts[2..].iter().map(Counts::of).fold(Counts::default(), Counts::and)
    }
}

/// How often servers and clients were killed.
#[derive(Default, Debug)]
struct Kills {
    servers: u64,
    clients: u64,
}

/// Programs are killed for so long, a second on average between two, every fourth time one of either side at once.
fn churn(crowd: &mut Crowd<'_>, time: Duration, dice: &mut Dice) -> Kills {
    let end = Instant::now() + time;
    let (mut kills, mut last, mut moved) = (Kills::default(), 0, Instant::now());
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(300 + dice.roll(1000)));
        let whole = crowd.clients().whole;
        if whole > last {
            (last, moved) = (whole, Instant::now());
        }
        assert!(moved.elapsed() < STUCK, "no connection comes to its end: {:?}", crowd.clients());
        named(crowd);
        let (server, client) = (dice.roll(2) as usize, 2 + dice.roll(2) as usize);
        let who = match dice.roll(8) {
            0..2 => vec![server, client],
            2..5 => vec![server],
            _ => vec![client],
        };
        who.iter().for_each(|n| crowd.programs[*n].kill());
        for n in who {
            crowd.programs[n] = crowd.start(n);
            *(if n < 2 { &mut kills.servers } else { &mut kills.clients }) += 1;
        }
    }
    kills
}

/// Whoever is on TCP is so for a reason that has a name, or goes to its lane with its next bytes, or was on it and ends.
fn named(crowd: &Crowd<'_>) {
    for guest in ["a", crowd.path.server()] {
        for line in crowd.lab.ss(guest) {
            let ends = line.0["stage"] == "ending" && line.0["generation"] != 0;
            let named = line.0["reason"].is_string() || line.0["stage"] == "committed" || ends;
            assert!(line.lanes() != ("tcp", "tcp") || named, "{line:?}");
        }
    }
}

// ---------------------------------------------------------------- what there is

/// Whatever is counted at one moment, by name.
type Census = BTreeMap<String, u64>;

fn census(lab: &Lab) -> Census {
    let mut all = Census::new();
    for (role, name, pid) in lab.daemons() {
        let mut put = |what: &str, n: u64| all.insert(format!("{role} {name} {what}"), n);
        process(pid, &mut put);
        let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("a number: {value}"));
        if role == "agent" {
            let Value::Object(stat) = lab.stat(&name).0 else { panic!("no object") };
            put("connections", number(&stat["connections"]["open"]));
            put("on a lane", number(&stat["connections"]["on_lane"]));
            for what in ["open", "processes", "slabs"] {
                put(&format!("programs: {what}"), number(&stat["programs"][what]));
            }
            continue;
        }
        let stat = lab.host_stat(&name);
        for what in ["slabs", "stays", "offers"] {
            put(what, number(&stat[what]));
        }
        for what in ["direct", "fabric", "relay"] {
            put(&format!("lanes: {what}"), number(&stat["lanes"][what]));
        }
        for what in ["queue_pairs", "regions"] {
            put(what, number(&stat["fabric_uses"][what]));
        }
        let connections =
            stat["vports"].as_array().expect("vports").iter().map(|v| number(&v["connections"]));
        put("connections", connections.sum());
    }
    for guest in ["a", "b", "c"] {
        let sockets = lab.must(&["exec", guest, "--", "cat", "/proc/net/sockstat"]);
        let tcp = sockets.lines().find_map(|line| line.strip_prefix("TCP: ")).expect("a line about TCP");
        let words: Vec<&str> = tcp.split(' ').collect();
        for pair in words.as_chunks::<2>().0.iter().filter(|[what, _]| ["inuse", "orphan"].contains(what)) {
            all.insert(format!("guest {guest} sockets: {}", pair[0]), pair[1].parse().expect("a number"));
        }
    }
    all
}

/// What the kernel counts of a process.
fn process(pid: u32, mut put: impl FnMut(&str, u64) -> Option<u64>) {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).expect("a daemon that runs");
    put("descriptors", fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count() as u64);
    let maps = read("maps");
    put("mappings of shared memory", maps.lines().filter(|line| line.contains("/memfd:")).count() as u64);
    let status = read("status");
    for (what, name) in [("RssAnon:", "own memory, kB"), ("RssShmem:", "shared memory, kB")] {
        let line = status.lines().find_map(|line| line.strip_prefix(what)).expect("a line about memory");
        put(name, line.trim().trim_end_matches(" kB").parse().expect("a number"));
    }
}

/// What has grown, with a word for the message. Memory of its own may, a little.
fn grown(before: &Census, now: &Census) -> Vec<String> {
    let more = |(what, now): (&String, &u64)| {
        let before = before.get(what).copied().unwrap_or(0);
        let allowed = if what.ends_with("own memory, kB") { KEPT } else { 0 };
        (*now > before + allowed).then(|| format!("{what}: {before} before, {now} now"))
    };
    now.iter().filter_map(more).collect()
}

/// Waits until nothing is left of the programs, that all have ended.
fn settled(lab: &Lab) -> Census {
    let open = |(what, n): (&String, &u64)| {
        let words =
            ["connections", "on a lane", "slabs", "stays", "offers", "lanes:", "sockets:", "programs:"];
        *n > 0 && words.iter().any(|word| what.contains(word))
    };
    let mut now = census(lab);
    let end = Instant::now() + SETTLED;
    loop {
        let left: Vec<_> = now.iter().filter(|entry| open(*entry)).collect();
        if left.is_empty() {
            return now;
        }
        assert!(Instant::now() < end, "left after {SETTLED:?}: {left:#?}");
        std::thread::sleep(Duration::from_millis(100));
        now = census(lab);
    }
}

// ---------------------------------------------------------------- the test

fn come_and_go(path: Path) {
    let (seconds, rate) = (setting("CHURN_SECONDS", 4), setting("CHURN_RATE", 1000));
    let seed = setting("CHURN_SEED", 1);
    eprintln!("churn {path:?}: {seconds} s, seed {seed}");
    let mut dice = Dice(seed);
    let lab = Lab::up_for(&format!("churn-{path:?}"), path);
    calm(&lab, path, rate);

    let mut warm = Crowd::new(&lab, "run", path, rate, "warm");
    churn(&mut warm, WARM_UP, &mut dice);
    warm.end();
    let start = settled(&lab);

    let (before, stats) = (lab.before(path), ["a", path.server()].map(|guest| lab.stat(guest)));
    let mut crowd = Crowd::new(&lab, "run", path, rate, "churn");
    let begun = Instant::now();
    let kills = churn(&mut crowd, Duration::from_secs(seconds), &mut dice);
    let time = begun.elapsed().as_secs_f64();
    let counts = crowd.end();
    let (opened, bytes) = (counts.begun as f64 / time, counts.bytes());
    eprintln!(
        "churn {path:?}: {opened:.0} opened a second, {bytes} bytes whole; killed {kills:?}; {counts:?}"
    );
    let moved = |lane| lab.stat("a").moved(lane) - stats[0].moved(lane);
    let upgraded = lab.stat("a").connections("upgraded_total") - stats[0].connections("upgraded_total");
    eprintln!(
        "churn {path:?}: {upgraded} upgraded, {} bytes on {}, {} on tcp",
        moved(path.lane()),
        path.lane(),
        moved("tcp")
    );
    assert!(counts.cut <= kills.servers * CUTS, "cut by nobody: {counts:?}");
    // Many of the long ones are over before their lane is there.
    before.upgraded(counts.long.div_ceil(20));
    before.on_lane(counts.bytes() / 10, 0.1);
    not_grown(&lab, path, &start);
}

/// Without anybody being killed nothing is cut. How many connections the kernel opens meanwhile, and we do, is shown, not
/// judged: the machine is shared.
fn calm(lab: &Lab, path: Path, rate: u64) {
    let native = Crowd::new(lab, "exec", path, rate, "native");
    let kernel = native.rate_in(CALM);
    native.end();
    let calm = Crowd::new(lab, "run", path, rate, "calm");
    let ours = calm.rate_in(CALM);
    let counts = calm.end();
    eprintln!("churn {path:?}: nobody killed: kernel {kernel:.0} a second, ours {ours:.0}");
    assert!(counts.whole > 0 && (counts.refused, counts.cut) == (0, 0), "nobody was killed: {counts:?}");
}

fn not_grown(lab: &Lab, path: Path, start: &Census) {
    settled(lab);
    let end = Instant::now() + SETTLED;
    loop {
        let now = census(lab);
        let grown = grown(start, &now);
        if grown.is_empty() {
            let differs = now.iter().filter(|(what, n)| start.get(*what) != Some(n));
            let differs: Vec<_> =
                differs.map(|(what, n)| format!("{what} {} -> {n}", start.get(what).unwrap_or(&0))).collect();
            return eprintln!(
                "churn {path:?}: {} counts, those that differ: {}",
                now.len(),
                differs.join("; ")
            );
        }
        assert!(Instant::now() < end, "grown, after {SETTLED:?}: {grown:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn programs_come_and_go_same_host() {
    come_and_go(Path::SameHost);
}

#[test]
fn programs_come_and_go_cross_host() {
    come_and_go(Path::CrossHost);
}

#[test]
fn programs_come_and_go_relayed() {
    come_and_go(Path::Relayed);
}
