//! `vsocketd capture` against a reader of packets that knows nothing of us: what it writes is VXLAN with the tenants' TCP
//! in it, whole and in order; and whatever becomes of the tool, traffic goes on.

mod common;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path as FilePath, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::{Lab, Program, SOON, profile_dir, v4, v6, wait_until};
use rustix::process::{Pid, Signal, kill_process};

/// Ports that no dissector claims.
const PORTS: [u16; 3] = [40_001, 40_002, 40_003];

// ---------------------------------------------------------------- the tool

/// A capture that runs. It asks a socket in the file system, so it needs no namespace.
struct Capture {
    child: Child,
    err: PathBuf,
}

impl Capture {
    fn start(lab: &Lab, host: &str, out: Stdio, options: &[&str]) -> Self {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let n = LAST.fetch_add(1, Ordering::Relaxed);
        let err = lab.state().join(format!("capture-{n}-{host}.err"));
        let bin = std::env::var_os("VSOCKET_BIN").map_or_else(profile_dir, PathBuf::from);
        let child = Command::new(bin.join("vsocketd"))
            .arg("capture")
            .arg("--control")
            .arg(lab.state().join(format!("{host}.ctl")))
            .args(options)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(File::create(&err).unwrap())
            .spawn()
            .unwrap();
        Self { child, err }
    }

    /// One that has begun.
    fn new(lab: &Lab, host: &str, options: &[&str]) -> Self {
        let mut capture = Self::start(lab, host, Stdio::null(), options);
        capture.begins();
        capture
    }

    fn begins(&mut self) {
        wait_until(SOON, "the capture begins", || {
            assert!(matches!(self.child.try_wait(), Ok(None)), "{}", self.told());
            self.told().contains("capturing on")
        });
    }

    fn told(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
    }

    /// Waits for its end: whether it was a good one, and what it told.
    fn ends(mut self) -> (bool, String) {
        wait_until(SOON, "the capture ends", || matches!(self.child.try_wait(), Ok(Some(_))));
        (self.child.wait().unwrap().success(), self.told())
    }

    /// Ctrl-C: what it told.
    fn interrupt(self) -> String {
        self.signal(Signal::INT);
        let (good, told) = self.ends();
        assert!(good, "{told}");
        told
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn captures(lab: &Lab, host: &str) -> u64 {
    lab.host_stat(host)["captures"].as_u64().unwrap()
}

// ---------------------------------------------------------------- the reader

/// Fields of all packets of a file, as tshark reads them. What the tenants say inside TCP is not looked at.
fn tshark(file: &FilePath, fields: &[&str]) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    command.args(["-n", "-r"]).arg(file);
    command.args(["-d", "tcp.port==1-65535,data"]);
    let checks = ["ip.check_checksum:TRUE", "tcp.check_checksum:TRUE", "udp.check_checksum:TRUE"];
    for check in checks {
        command.args(["-o", check]);
    }
    command.args(["-T", "fields", "-E", "separator=/t"]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().expect("tshark");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tshark: {err}");
    let out = String::from_utf8(output.stdout).unwrap();
    out.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

/// One direction of a connection: inner addresses and ports.
type Way = (String, String, String);

/// What a direction carried.
#[derive(Default, Debug)]
struct Stream {
    /// Of its last stay on the lane.
    first: u32,
    /// What goes on the stay, if one is open.
    next: Option<u32>,
    stays: u64,
    /// In all stays.
    bytes: u64,
    outer: Vec<String>,
}

/// Checks every packet of a capture, and that sequence numbers go on in each stay; what each direction carried.
fn checked(file: &FilePath) -> HashMap<Way, Stream> {
    let fields = [
        "frame.protocols",
        "vxlan.vni",
        "udp.dstport",
        "ip.src",
        "ip.dst",
        "ipv6.src",
        "ipv6.dst",
        "tcp.srcport",
        "tcp.dstport",
        "tcp.seq_raw",
        "tcp.len",
        "tcp.flags",
        "ip.checksum.status",
        "tcp.checksum.status",
        "_ws.malformed",
        "udp.srcport",
    ];
    let mut streams: HashMap<Way, Stream> = HashMap::new();
    for packet in tshark(file, &fields) {
        let [protocols, vni, port, src4, dst4, src6, dst6, from, to, seq, len, flags, ip, tcp, bad, entropy] =
            packet.iter().map(String::as_str).collect::<Vec<_>>()[..]
        else {
            panic!("{packet:?}")
        };
        let inner = if src6.is_empty() { "ip" } else { "ipv6" };
        let layers = format!("eth:ethertype:ip:udp:vxlan:eth:ethertype:{inner}:tcp");
        assert!(protocols == layers || protocols == format!("{layers}:data"), "{packet:?}");
        assert_eq!((vni, port, tcp, bad), ("100", "4789", "1", ""), "{packet:?}");
        assert!(ip.split(',').all(|status| status == "1"), "{packet:?}");
        let (hosts, guests) = (src4.split_once(','), dst4.split_once(','));
        let (outer, src, dst) = match (hosts, guests) {
            (Some((src, guest)), Some((dst, far))) => (format!("{src} {dst}"), guest, far),
            _ => (format!("{src4} {dst4}"), src6, dst6),
        };
        let way = (src.to_owned(), dst.to_owned(), format!("{from} {to}"));
        let stream = streams.entry(way).or_default();
        let outer = format!("{outer} {entropy}");
        if !stream.outer.contains(&outer) {
            stream.outer.push(outer);
        }
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap();
        let (seq, len): (u32, u32) = (seq.parse().unwrap(), len.parse().unwrap());
        let (fin, syn) = (flags & 1, (flags >> 1) & 1);
        if syn == 1 {
            // A connection may leave its lane and come back in another generation.
            stream.first = seq.wrapping_add(1);
            stream.next = Some(seq);
            stream.stays += 1;
        }
        let Some(next) = stream.next else {
            assert!(
                len == 0 && seq == 0,
                "outside a stay there is only what the other way needs: {packet:?}"
            );
            continue;
        };
        assert_eq!(seq, next, "sequence numbers go on: {packet:?}, {stream:?}");
        stream.next = (fin == 0).then(|| seq.wrapping_add(len + syn));
        stream.bytes += u64::from(len);
    }
    streams
}

/// The payload of one direction.
fn payload(file: &FilePath, to: u16) -> Vec<u8> {
    let to = to.to_string();
    let hex = tshark(file, &["tcp.dstport", "tcp.payload"]);
    let hex = hex.into_iter().filter(|packet| packet[0] == to).map(|mut packet| packet.remove(1));
    let digit = |c: u8| (c as char).to_digit(16).unwrap() as u8;
    hex.flat_map(|hex| hex.as_bytes().chunks(2).map(|c| digit(c[0]) << 4 | digit(c[1])).collect::<Vec<_>>())
        .collect()
}

// ---------------------------------------------------------------- tests

fn redis(lab: &Lab) -> Program {
    let address = v4("c", 6379).ip().to_string();
    let command = ["redis-server", "--bind", &address, "--save", "", "--protected-mode", "no"];
    lab.serve("c", 6379, &command)
}

#[test]
fn tshark_reads_vxlan_with_whole_streams_in_it() {
    let lab = Lab::up("capture-decodes");
    let files = ["h1", "h2"].map(|host| lab.state().join(format!("{host}.pcap")));
    let [one, two] = ["h1", "h2"].map(|host| {
        let file = lab.state().join(format!("{host}.pcap"));
        Capture::new(&lab, host, &["-w", file.to_str().unwrap(), "--bytes", "1G"])
    });
    let _redis = redis(&lab);
    // Not faster than that, so that most of it comes after the upgrade.
    let once = ["--once", "--pace", "8000000"];
    let servers = [v4("c", PORTS[0]), v6("c", PORTS[1])].map(|at| lab.stream_server("run", "c", at, &once));
    let large =
        lab.stream("run", "a", "connect", v4("c", PORTS[0]), &["--bytes", "8000000", "--pace", "8000000"]);
    let echo = ["--rounds", "500", "--size", "200", "--every", "1"];
    let small = lab.stream("run", "a", "echo", v6("c", PORTS[1]), &echo);
    let host = v4("c", 6379).ip().to_string();
    let benchmark = ["redis-benchmark", "-h", &host, "-t", "set", "-n", "20000", "-c", "5", "-d", "100"];
    lab.run("a", &benchmark).ok();
    for program in [large, small].into_iter().chain(servers) {
        program.report();
    }
    for (capture, file) in [one, two].into_iter().zip(&files) {
        let told = capture.interrupt();
        assert!(told.contains("dropped: none"), "{told}");
        let streams = checked(file);
        let of = |port: u16| {
            let port = port.to_string();
            let ours = streams.iter().filter(|((.., ports), _)| ports.split(' ').any(|p| p == port));
            ours.collect::<Vec<_>>()
        };
        assert_eq!((of(PORTS[0]).len(), of(PORTS[1]).len()), (2, 2), "{streams:?}");
        assert!(of(6379).len() >= 10, "five connections, both ways: {streams:?}");
        let large = of(PORTS[0]).iter().map(|(_, stream)| stream.bytes).collect::<Vec<_>>();
        assert!(large.iter().all(|bytes| (1_000_000..8_000_000).contains(bytes)), "{large:?}");
        for ((src, ..), stream) in &streams {
            let from_a = [v4("a", 1).ip(), v6("a", 1).ip()].iter().any(|a| a.to_string() == *src);
            let hosts = if from_a { "192.0.2.1 192.0.2.2" } else { "192.0.2.2 192.0.2.1" };
            assert!(stream.outer.len() == 1 && stream.outer[0].starts_with(hosts), "{src}: {stream:?}");
        }
    }
}

/// A backend that does not answer is left, and met again in the next generation: each stay is a TCP stream of its own.
#[test]
fn every_stay_of_a_connection_is_a_stream() {
    let lab = Lab::up("capture-stays");
    let file = lab.state().join("h1.pcap");
    let capture = Capture::new(&lab, "h1", &["-w", file.to_str().unwrap(), "--bytes", "1G"]);
    let address = v4("c", PORTS[0]);
    let server = lab.stream_server("run", "c", address, &["--once"]);
    let mut client = lab.stream("run", "a", "connect", address, &["--until-eof", "--pace", "2000000"]);
    lab.on_lane("a", client.pid(), 1, "fabric");
    lab.daemon("pause", "backend", "h2");
    wait_until(SOON, "the lane is left", || {
        lab.connection("a", address).is_some_and(|line| line.lanes() == ("tcp", "tcp"))
    });
    lab.daemon("cont", "backend", "h2");
    lab.on_lane("a", client.pid(), 1, "fabric");
    client.end_input();
    client.report();
    server.report();
    let told = capture.interrupt();
    assert!(told.contains("dropped: none"), "{told}");
    let streams = checked(&file);
    let stays: Vec<_> = streams.values().map(|stream| stream.stays).collect();
    assert!(stays.len() == 2 && stays.iter().all(|stays| *stays >= 2), "{streams:?}");
}

/// Sends a file's bytes, not all before the upgrade, and takes them.
const SEND: &str = "import socket,sys,time
s=socket.create_connection((sys.argv[1],int(sys.argv[2])))
f=open(sys.argv[3],'rb')
while b:=f.read(1<<15):s.sendall(b);time.sleep(.01)
s.shutdown(1);s.recv(1)";
const TAKE: &str = "import socket,sys
l=socket.create_server((sys.argv[1],int(sys.argv[2])))
c=l.accept()[0]
while c.recv(1<<16):pass
c.close()";

#[test]
fn the_payload_is_what_was_sent_and_others_are_left_out() {
    let lab = Lab::up("capture-payload");
    let text = lab.state().join("bytes");
    let bytes: Vec<u8> = (0..1u64 << 18).flat_map(|n| (n * n).to_le_bytes()).collect();
    fs::write(&text, &bytes).unwrap();
    let files = ["h1", "h2"].map(|host| lab.state().join(format!("{host}.pcap")));
    let [wanted, other] = [PORTS[0], PORTS[1]];
    let (out, back) = (format!("*-*:{wanted}"), format!("{}-*", v4("c", wanted)));
    let one = ["--vport", "a", "--vni", "100", "--flow", &out, "-w", files[0].to_str().unwrap()];
    let two = ["--flow", &back, "-w", files[1].to_str().unwrap()];
    let captures = [Capture::new(&lab, "h1", &one), Capture::new(&lab, "h2", &two)];
    for port in [other, wanted] {
        let [address, port] = [v4("c", port).ip().to_string(), port.to_string()];
        let server = lab.serve("c", port.parse().unwrap(), &["python3", "-c", TAKE, &address, &port]);
        let text = text.to_str().unwrap();
        lab.run("a", &["python3", "-c", SEND, &address, &port, text]).ok();
        server.ok();
    }
    for (capture, file) in captures.into_iter().zip(&files) {
        capture.interrupt();
        let streams = checked(file);
        let to = |port: u16| {
            let port = port.to_string();
            streams.iter().find(|((.., ports), _)| ports.ends_with(&port)).map(|(_, stream)| stream)
        };
        assert!(to(other).is_none() && streams.len() == 2, "{streams:?}");
        let stream = to(wanted).unwrap();
        // The sequence number is the offset in the stream; what came before went by kernel TCP.
        let first = stream.first as usize;
        assert_eq!(first + stream.bytes as usize, bytes.len(), "to its last byte");
        assert!(first < bytes.len() / 2 && payload(file, wanted) == bytes[first..], "from {first} on");
    }
}

#[test]
fn limits_end_a_capture_and_bad_requests_say_why() {
    let lab = Lab::up("capture-limits");
    let file = |name: &str| lab.state().join(name).to_str().unwrap().to_owned();
    let [bytes, count, snap] = ["bytes", "count", "snap"].map(file);
    let limited = [
        Capture::new(&lab, "h1", &["-w", &bytes, "--bytes", "500K"]),
        Capture::new(&lab, "h1", &["-w", &count, "--count", "10"]),
        Capture::new(&lab, "h1", &["-w", &snap, "--count", "40", "--snaplen", "96"]),
    ];
    let server = lab.stream_server("run", "c", v4("c", PORTS[0]), &["--once", "--pace", "8000000"]);
    let paced = ["--bytes", "12000000", "--pace", "8000000"];
    lab.stream("run", "a", "connect", v4("c", PORTS[0]), &paced).report();
    server.report();
    let told = limited.map(Capture::ends);
    assert!(told.iter().all(|(good, _)| *good), "{told:?}");
    assert!(told[0].1.contains("; --bytes reached") && told[1].1.contains("; --count reached"), "{told:?}");
    let len = fs::metadata(&bytes).unwrap().len();
    assert!((400 << 10..=500 << 10).contains(&len), "{len} bytes");
    checked(FilePath::new(&bytes));
    assert_eq!(tshark(FilePath::new(&count), &["frame.number"]).len(), 10);
    let cut = tshark(FilePath::new(&snap), &["frame.cap_len", "frame.len", "_ws.malformed"]);
    assert!(cut.len() == 40 && cut.iter().all(|p| p[0] == "96" && p[2].is_empty()), "{cut:?}");
    assert!(cut.iter().any(|p| p[1].parse::<u32>().unwrap() > 8000), "{cut:?}");

    let refused = |options: &[&str]| {
        let (good, told) = Capture::start(&lab, "h1", Stdio::null(), options).ends();
        assert!(!good, "{options:?}: {told}");
        told
    };
    for (options, why) in [
        (&["-w", &bytes, "--vport", "x"][..], "there is no vport x; there are: a, b, e"),
        (&["-w", &bytes, "--vni", "7"], "no vport of this host is in VNI 7"),
        (&["-w", &bytes, "--flow", "*-*:x"], "'x' is no port"),
        (&["-w", &bytes, "--buffer", "1K"], "--buffer must be between"),
        (&["-w", "/nonexistent/file"], "cannot write /nonexistent/file: No such file"),
        (&["-w", "/dev/full"], "cannot write /dev/full: No space left"),
    ] {
        let told = refused(options);
        assert!(told.contains(why), "{options:?}: {told}");
    }
    assert_eq!(fs::metadata(&bytes).unwrap().len(), len, "a refused request touches no file");

    // A connection within the host has nothing to capture, and the tool says so.
    let server = lab.stream_server("run", "b", v4("b", PORTS[0]), &[]);
    let client = lab.stream("run", "a", "echo", v4("b", PORTS[0]), &["--until-eof", "--every", "1"]);
    lab.on_lane("a", client.pid(), 1, "direct");
    let told = Capture::new(&lab, "h1", &["-w", &count, "--vport", "a"]).interrupt();
    assert!(told.contains("all that match (1) are on lane direct"), "{told}");
    assert!(told.contains("0 packets"), "{told}");
    client.finish();
    drop(server);
    assert_eq!(captures(&lab, "h1"), 0);
}

#[test]
fn a_killed_or_stuck_tool_disturbs_nothing() {
    let lab = Lab::up("capture-stuck");
    let file = lab.state().join("killed.pcap");
    let stream = || {
        let begin = Instant::now();
        let server = lab.stream_server("run", "c", v4("c", PORTS[0]), &["--once"]);
        lab.stream("run", "a", "connect", v4("c", PORTS[0]), &["--bytes", "64000000"]).report();
        server.report();
        begin.elapsed()
    };
    let alone = stream();

    // One that nobody reads from: the pipe is full after 64 KiB, the queue soon after.
    let mut stuck = Capture::start(&lab, "h1", Stdio::piped(), &["-w", "-", "--buffer", "256K"]);
    stuck.begins();
    let beside = stream();
    assert!(
        beside < alone * 3 + Duration::from_secs(2),
        "{beside:?} beside a stuck capture, {alone:?} alone"
    );
    assert_eq!(captures(&lab, "h1"), 1);
    // Now somebody does, and what it gets is a good file with gaps in it.
    let mut pipe = stuck.child.stdout.take().unwrap();
    stuck.signal(Signal::INT);
    let mut read = Vec::new();
    pipe.read_to_end(&mut read).unwrap();
    let (good, told) = stuck.ends();
    assert!(good && told.contains("dropped: queue-full "), "{told}");
    let part = lab.state().join("part.pcap");
    fs::write(&part, &read).unwrap();
    let packets = tshark(&part, &["tcp.checksum.status", "_ws.malformed"]);
    assert!(packets.len() > 2 && packets.iter().all(|p| p[0] == "1" && p[1].is_empty()), "{packets:?}");

    // One that is killed in the middle.
    let killed = Capture::new(&lab, "h1", &["-w", file.to_str().unwrap(), "--bytes", "4G"]);
    let server = lab.stream_server("run", "c", v4("c", PORTS[1]), &["--once"]);
    let client = lab.stream("run", "a", "connect", v4("c", PORTS[1]), &["--until-eof", "--pace", "50000000"]);
    wait_until(SOON, "it writes", || fs::metadata(&file).is_ok_and(|file| file.len() > 1 << 20));
    killed.signal(Signal::KILL);
    killed.ends();
    wait_until(SOON, "the daemon sees its end", || captures(&lab, "h1") == 0);
    client.finish();
    server.report();

    // A reader that has seen enough ends the tool; a daemon that ends is told.
    let mut left = Capture::start(&lab, "h1", Stdio::piped(), &["-w", "-"]);
    left.begins();
    drop(left.child.stdout.take());
    let mut last = Capture::new(&lab, "h1", &["-w", file.to_str().unwrap(), "--bytes", "4G"]);
    stream();
    let (good, told) = left.ends();
    assert!(good, "{told}");
    last.begins();
    lab.daemon("kill", "backend", "h1");
    let (good, told) = last.ends();
    assert!(!good && told.contains("the daemon has ended the capture"), "{told}");
    assert!(!tshark(&file, &["frame.number"]).is_empty());
}
