//! What a cross-host lane looks like on the underlay: a TCP connection between two hosts, in it MPA frames (RFC 5044), in
//! these RDMA WRITEs and SENDs (RFC 5040, 5041), and in every SEND a VXLAN segment of the tenant's. Read here by the RFCs,
//! not with the product's code; only the segments are decoded with `vsocket-vxlan`.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path as FilePath;

use common::{Lab, PROGRAM, Path, Program, SOON, v4, v6, wait_until};
use pcap_file::pcap::PcapReader;
use rustix::process::{Pid, Signal, kill_process};
use vsocket_vxlan::{Error, Flags, PayloadAt, Segment, StayOpen, decapsulate};

const FABRIC_PORT: u16 = 4790;
/// Servers of guest c, over IPv4 and IPv6.
const LARGE: u16 = 7000;
const SMALL: u16 = 7001;
const HOSTS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
/// MACs of guests a and c, as the lab makes them.
const A: [u8; 6] = [2, 0, 0, 100, 0, 1];
const C: [u8; 6] = [2, 0, 0, 100, 0, 3];

// ---------------------------------------------------------------- frames, addresses, TCP

/// A TCP segment of the underlay.
struct Outer<'a> {
    ends: (SocketAddr, SocketAddr),
    seq: u32,
    syn: bool,
    payload: &'a [u8],
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) << 16 | u32::from(u16_at(bytes, at + 2))
}

/// The outer addresses of a captured frame, if it is IP at all, and its TCP segment, if it is IPv4 and TCP.
fn outer(frame: &[u8]) -> (Option<[IpAddr; 2]>, Option<Outer<'_>>) {
    let v6 = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).unwrap());
    match u16_at(frame, 12) {
        0x86dd => return (Some([v6(22).into(), v6(38).into()]), None),
        0x0800 => {}
        _ => return (None, None),
    }
    let addresses = [26, 30].map(|at| Ipv4Addr::from_bits(u32_at(frame, at)));
    let ip = Some(addresses.map(IpAddr::from));
    let (header, total) = (usize::from(frame[14] & 15) * 4, usize::from(u16_at(frame, 16)));
    if frame[23] != 6 {
        return (ip, None);
    }
    // A frame may be padded; one that the sender's kernel has not cut up yet may be too long to say so.
    let end = if total == 0 { frame.len() } else { 14 + total };
    let tcp = &frame[14 + header..end];
    let [from, to] = addresses;
    let ends = (SocketAddr::from((from, u16_at(tcp, 0))), SocketAddr::from((to, u16_at(tcp, 2))));
    let payload = &tcp[usize::from(tcp[12] >> 4) * 4..];
    (ip, Some(Outer { ends, seq: u32_at(tcp, 4), syn: tcp[13] & 2 != 0, payload }))
}

/// One direction of a TCP connection, from pieces in any order.
#[derive(Default)]
struct Stream {
    first: Option<u32>,
    pieces: BTreeMap<u32, Vec<u8>>,
}

impl Stream {
    fn take(&mut self, segment: &Outer<'_>) {
        if segment.syn {
            self.first = Some(segment.seq.wrapping_add(1));
        } else if !segment.payload.is_empty() {
            let first = self.first.expect("the capture began before the connection");
            let piece = self.pieces.entry(segment.seq.wrapping_sub(first)).or_default();
            if piece.len() < segment.payload.len() {
                *piece = segment.payload.to_vec();
            }
        }
    }

    fn assembled(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, piece) in self.pieces {
            let known = bytes.len().checked_sub(at as usize).expect("no gap in the capture");
            bytes.extend_from_slice(piece.get(known..).unwrap_or_default());
        }
        bytes
    }
}

/// All the connections to the fabric's port, each direction assembled; on the way, no outer address is a tenant's.
fn fabric_streams(capture: &FilePath) -> HashMap<(SocketAddr, SocketAddr), Vec<u8>> {
    let mut streams: HashMap<_, Stream> = HashMap::new();
    let mut reader = PcapReader::new(File::open(capture).unwrap()).unwrap();
    while let Some(packet) = reader.next_raw_packet() {
        let packet = packet.unwrap();
        assert_eq!(packet.incl_len, packet.orig_len, "captured whole");
        let (addresses, segment) = outer(&packet.data);
        for address in addresses.into_iter().flatten() {
            let belongs = match address {
                IpAddr::V4(v4) => HOSTS.contains(&v4),
                IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast() || v6.is_unspecified(),
            };
            assert!(belongs, "{address} is an outer address");
        }
        let Some(segment) = segment else { continue };
        if [segment.ends.0.port(), segment.ends.1.port()].contains(&FABRIC_PORT) {
            streams.entry(segment.ends).or_default().take(&segment);
        }
    }
    streams.into_iter().map(|(ends, stream)| (ends, stream.assembled())).collect()
}

// ---------------------------------------------------------------- MPA, DDP, RDMAP

/// The ULPDUs of one direction, after its start-up frame.
fn ulpdus(stream: &[u8]) -> Vec<&[u8]> {
    assert!(stream.starts_with(b"MPA ID Re"), "an MPA start-up frame");
    let mut rest = &stream[20 + usize::from(u16_at(stream, 18))..];
    let mut found = Vec::new();
    while rest.len() >= 2 {
        let len = usize::from(u16_at(rest, 0));
        let whole = (2 + len).next_multiple_of(4) + 4;
        let Some(fpdu) = rest.get(..whole) else { break };
        found.push(&fpdu[2..2 + len]);
        rest = &rest[whole..];
    }
    assert!(rest.is_empty(), "{} bytes are no FPDU", rest.len());
    found
}

/// A segment, and how many bytes of payload belong to it: in its SEND, or gone ahead.
struct Inner {
    segment: Segment,
    inline: usize,
    ahead: usize,
}

/// What one direction of the fabric's connection said: the tenants' segments, and how many bytes it wrote by RDMA.
fn segments(stream: &[u8]) -> (Vec<Inner>, usize) {
    let (mut segments, mut written, mut messages) = (Vec::new(), 0, 0);
    for ulpdu in ulpdus(stream) {
        let (control, opcode) = (ulpdu[0], ulpdu[1]);
        assert_eq!((control & 3, opcode >> 6), (1, 1), "versions of DDP and RDMAP");
        if control & 0x80 != 0 {
            assert_eq!(opcode & 15, 0, "a WRITE is the only tagged operation");
            written += ulpdu.len() - 14;
            continue;
        }
        messages += 1;
        assert_eq!((opcode & 15, u32_at(ulpdu, 6)), (3, 0), "a SEND on queue 0");
        assert_eq!((u32_at(ulpdu, 10), u32_at(ulpdu, 14)), (messages, 0), "numbered from 1, each whole");
        let message = &ulpdu[18..];
        let (at, decoded) = match decapsulate(message, PayloadAt::Inline) {
            Err(Error::PayloadTruncated) => {
                (PayloadAt::Elsewhere, decapsulate(message, PayloadAt::Elsewhere))
            }
            other => (PayloadAt::Inline, other),
        };
        let (segment, _, len) = decoded.unwrap_or_else(|e| panic!("{e:?}: {message:02x?}"));
        let (inline, ahead) = if at == PayloadAt::Inline { (len, 0) } else { (0, len) };
        segments.push(Inner { segment, inline, ahead });
    }
    (segments, written)
}

// ---------------------------------------------------------------- what a direction must say

/// One direction of a tenant's connection.
#[derive(Default)]
struct Direction {
    next: u32,
    open: Option<StayOpen>,
    ended: bool,
    inline: u64,
    ahead: u64,
}

impl Direction {
    fn take(&mut self, Inner { segment, inline, ahead }: Inner) {
        let Segment { seq, flags, stay, .. } = segment;
        assert!(!self.ended, "nothing follows FIN: {segment:?}");
        assert_eq!(stay.generation, 1, "{segment:?}");
        assert_eq!(flags.contains(Flags::SYN), stay.open.is_some(), "{segment:?}");
        if let Some(open) = stay.open {
            assert!(self.open.is_none(), "a stay is opened once: {segment:?}");
            assert_eq!(open.start as u32, seq, "{segment:?}");
            (self.open, self.next) = (Some(open), seq);
        }
        assert!(self.open.is_some() || inline + ahead == 0, "payload before the stay: {segment:?}");
        assert_eq!(seq, self.next, "sequence numbers go on: {segment:?}");
        assert_eq!(flags.contains(Flags::PSH), inline > 0, "{segment:?}");
        self.next = self.next.wrapping_add((inline + ahead) as u32);
        self.inline += inline as u64;
        self.ahead += ahead as u64;
        self.ended = flags.contains(Flags::FIN);
    }
}

fn tcpdump(lab: &Lab, file: &str) -> Program {
    let options = [
        "tcpdump",
        "-i",
        "under0",
        "-n",
        "-s",
        "0",
        "-B",
        "131072",
        "-Z",
        "root",
        "--immediate-mode",
        "-w",
        file,
    ];
    let mut program = lab.exec("h2", &options);
    wait_until(SOON, "tcpdump listens", || {
        assert!(program.runs(), "{}", program.err());
        program.err().contains("listening on")
    });
    program
}

#[test]
fn the_underlay_carries_vxlan_segments_in_mpa_frames() {
    let lab = Lab::up("capture");
    let file = lab.state().join("underlay.pcap");
    let dump = tcpdump(&lab, file.to_str().unwrap());
    let before = lab.before(Path::CrossHost);
    // One connection of large messages, and one of small ones, at the same time.
    let servers = [v4("c", LARGE), v6("c", SMALL)].map(|at| lab.stream_server("run", "c", at, &["--once"]));
    // Not faster than that, so that most rounds come after the upgrade.
    let rounds = ["--rounds", "1000", "--every", "1"];
    let echo = |to, size| lab.stream("run", "a", "echo", to, &[&rounds[..], &["--size", size]].concat());
    let clients = [echo(v4("c", LARGE), "40000"), echo(v6("c", SMALL), "200")];
    for program in clients.into_iter().chain(servers) {
        program.report();
    }
    before.upgraded(2);
    assert!(lab.stat("a").moved("fabric") > 40_000_000, "{:?}", lab.stat("a"));
    // Both agents have reckoned up, and what is on its way to tcpdump has arrived.
    wait_until(SOON, "the connections are over", || {
        ["a", "c"].iter().all(|guest| lab.stat(guest).connections("open") == 0)
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    kill_process(Pid::from_raw(dump.pid() as i32).unwrap(), Signal::INT).unwrap();
    let ended = dump.ends(PROGRAM);
    assert!(ended.err.contains("\n0 packets dropped by kernel"), "{}", ended.err);

    let mut directions: HashMap<(SocketAddr, SocketAddr), Direction> = HashMap::new();
    let streams = fabric_streams(&file);
    assert_eq!(streams.len(), 2, "one connection between the hosts, both ways: {:?}", streams.keys());
    for (ends, stream) in streams {
        let from_h1 = ends.0.ip() == HOSTS[0];
        let (inner, written) = segments(&stream);
        let (guests, macs) = if from_h1 { (["a", "c"], [A, C]) } else { (["c", "a"], [C, A]) };
        let mut ahead = 0;
        for inner in inner {
            let Segment { vni, src_mac, dst_mac, src, dst, .. } = inner.segment;
            assert_eq!((vni.number(), [src_mac, dst_mac]), (100, macs), "{:?}", inner.segment);
            let port = if from_h1 { dst.port() } else { src.port() };
            let address = |guest| if port == LARGE { v4(guest, port).ip() } else { v6(guest, port).ip() };
            assert!(port == LARGE || port == SMALL, "{:?}", inner.segment);
            assert_eq!([src.ip(), dst.ip()], guests.map(address), "{:?}", inner.segment);
            ahead += inner.ahead;
            directions.entry((src, dst)).or_default().take(inner);
        }
        assert_eq!(written, ahead, "every byte written by RDMA has its header");
    }

    assert_eq!(directions.len(), 4, "two connections, both ways: {:?}", directions.keys());
    for ((src, dst), direction) in &directions {
        assert!(direction.open.is_some() && direction.ended, "{src} to {dst} opens and ends");
        assert!(directions.contains_key(&(*dst, *src)), "{src} to {dst}, and back");
        let large = [src.port(), dst.port()].contains(&LARGE);
        assert!(if large { direction.ahead > 0 } else { direction.inline > 0 && direction.ahead == 0 });
    }
    // Together they are what the agents say that the programs moved on the lane.
    let stat = lab.stat("a");
    let carried = |to_c: bool| -> u64 {
        let way =
            directions.iter().filter(|((_, dst), _)| (dst.port() == LARGE || dst.port() == SMALL) == to_c);
        way.map(|(_, direction)| direction.inline + direction.ahead).sum()
    };
    assert_eq!([carried(true), carried(false)], [stat.bytes("fabric", "tx"), stat.bytes("fabric", "rx")]);
}
