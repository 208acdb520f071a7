//! Tenants do not meet, although their addresses, ports and hosts coincide; and no guest speaks for another.

mod common;

use common::agent::{Backend, Directory, Fake};
use common::{Lab, PROGRAM, SOON, v4, wait_until};
use serde_json::Value;
use std::net::SocketAddr;
use vsocket_channel::message::Message;
use vsocket_channel::reason::Reason;

/// From this port of .1 to this one of .3, in both networks.
const PORTS: [u16; 2] = [6000, 7000];

/// A vport's counter, by `vsocketd stat --json`.
fn vport(stat: &Value, name: &str, key: &str) -> u64 {
    let vports = stat["vports"].as_array().expect("vports");
    let vport =
        vports.iter().find(|v| v["name"] == name).unwrap_or_else(|| panic!("no vport {name}: {stat}"));
    vport[key].as_u64().unwrap_or_else(|| panic!("no {key}: {vport}"))
}

#[test]
fn a_guest_reaches_nothing_of_another_network() {
    let lab = Lab::up("isolation-reach");
    let _b = lab.stream_server("run", "b", v4("b", 7000), &[]);
    let mut c = lab.stream_server("run", "c", v4("c", 7000), &[]);
    for verb in ["run", "exec"] {
        // Nobody has the address of b in d's network; the address of c is e's there, which does not listen.
        for (to, why) in [(v4("b", 7000), "route"), (v4("c", 7000), "refused")] {
            let ended = lab.stream(verb, "d", "echo", to, &["--rounds", "1"]).ends(PROGRAM);
            assert!(!ended.status.success() && ended.err.contains(why), "{to}: {} {}", ended.out, ended.err);
        }
    }
    assert!(c.runs() && c.reports().is_empty(), "nobody came to c: {}", c.out());
    lab.stream("run", "a", "echo", v4("c", 7000), &["--rounds", "1"]).ok();
}

#[test]
fn one_tuple_in_two_networks_is_two_connections() {
    let lab = Lab::up("isolation-tuple");
    let [from, to] = [v4("a", PORTS[0]), v4("c", PORTS[1])];
    assert_eq!([from, to], [v4("d", PORTS[0]), v4("e", PORTS[1])], "addresses coincide");
    let servers = ["c", "e"].map(|guest| lab.stream_server("run", guest, to, &["--once"]));
    let from = from.to_string();
    // Each its own bytes, checked at their return, and its own amount of them.
    let client = |guest, rounds, size, seed| {
        let options = ["--from", &from, "--rounds", rounds, "--size", size, "--seed", seed, "--every", "1"];
        lab.stream("run", guest, "echo", to, &options)
    };
    let clients = [("a", client("a", "3000", "20000", "11")), ("d", client("d", "3500", "9000", "12"))];
    for (guest, client) in &clients {
        lab.on_lane(guest, client.pid(), 1, "fabric");
    }
    for (server, guest) in servers.iter().zip(["c", "e"]) {
        lab.on_lane(guest, server.pid(), 1, "fabric");
    }
    // On each host the two ends are mirror images of each other, and yet no pair.
    for host in ["h1", "h2"] {
        let stat = lab.host_stat(host);
        assert_eq!((&stat["lanes"]["direct"], &stat["lanes"]["fabric"]), (&0.into(), &2.into()), "{stat}");
    }
    for ((_, client), moved) in clients.into_iter().zip([3000 * 20000, 3500 * 9000]) {
        assert_eq!(client.report()["received"].as_u64(), Some(moved));
    }
    for server in servers {
        server.report();
    }

    let carried =
        |guest: &str| [lab.stat(guest).bytes("fabric", "tx"), lab.stat(guest).bytes("fabric", "rx")];
    for (client, server, moved) in [("a", "c", 3000 * 20000), ("d", "e", 3500 * 9000)] {
        for guest in [client, server] {
            wait_until(SOON, "the connection is over", || lab.stat(guest).connections("open") == 0);
            let stat = lab.stat(guest);
            let totals = ["upgraded_total", "fabric_total", "direct_total"].map(|key| stat.connections(key));
            assert_eq!(totals, [1, 1, 0], "{guest}: {}", stat.0);
        }
        let [tx, rx] = carried(client);
        assert_eq!([rx, tx], carried(server), "{client} and {server} carried the same");
        assert!(tx <= moved + 20 && rx <= moved && rx > moved / 2, "{client}: {tx} {rx} of {moved}");
        // The hosts' own counters say the same of the vports.
        let [near, far] = if client == "a" { ["h1", "h2"] } else { ["h2", "h1"] };
        let (near, far) = (lab.host_stat(near), lab.host_stat(far));
        let counted = |stat, guest| ["tx_bytes", "rx_bytes"].map(|key| vport(stat, guest, key));
        assert_eq!((counted(&near, client), counted(&far, server)), ([tx, rx], [rx, tx]), "{near} {far}");
    }
    let idle = ["tx_bytes", "rx_bytes"].map(|key| vport(&lab.host_stat("h1"), "b", key));
    assert_eq!((idle, carried("b")), ([0, 0], [0, 0]), "b had no part in it");
}

/// Three guests of one host: two in a network, and one in another that has the second's address.
const ONE_HOST: &str = r#"
host = "h1"
control = "h1.ctl"
[[vport]]
name = "a"
vni = 100
mac = "02:00:00:00:00:01"
addresses = ["198.51.100.1", "2001:db8:100::1"]
socket = "a"
[[vport]]
name = "b"
vni = 100
mac = "02:00:00:00:00:02"
addresses = ["198.51.100.2", "2001:db8:100::2"]
socket = "b"
[[vport]]
name = "x"
vni = 200
mac = "02:00:00:00:00:02"
addresses = ["198.51.100.2", "2001:db8:100::2"]
socket = "x"
"#;

#[test]
fn a_vport_speaks_only_for_its_own_addresses() {
    let directory = Directory::new();
    let backend = Backend::start(&directory, "h1", ONE_HOST);
    let [a, b, x] = ["a", "b", "x"].map(|vport| Fake::attach(&directory.0.join(vport)));
    let declines = |reason: &str| backend.stat()["declines"][reason].as_u64().unwrap_or(0);

    let v6 = |n: u8, port: u16| -> SocketAddr { format!("[2001:db8:100::{n}]:{port}").parse().unwrap() };
    let loopback: SocketAddr = "127.0.0.1:4000".parse().unwrap();
    let mapped: SocketAddr = "[::ffff:198.51.100.2]:4000".parse().unwrap();
    let remote = v4("a", 80);
    let borrowed = [
        (v4("b", 4000), remote),
        (v4("c", 4000), remote),
        (v6(2, 4000), v6(1, 80)),
        (loopback, remote),
        (mapped, remote),
    ];
    for (n, (local, remote)) in borrowed.into_iter().enumerate() {
        let conn = n as u64 + 1;
        a.open(conn, local, remote);
        a.is_declined(conn, Reason::AddressNotYours);
        assert_eq!(declines("address-not-yours"), conn);
    }

    // The end that a waits for, but of the other network: neither hears of the other.
    a.open(10, v4("a", 4000), v4("b", 80));
    a.is_declined(10, Reason::PeerNotOpen);
    x.open(10, v4("b", 80), v4("a", 4000));
    x.is_declined(10, Reason::PeerUnknown);
    a.has_nothing_to_hear();
    assert_eq!(declines("peer-unknown"), 1);
    // In its own network it is found at once.
    b.open(10, v4("b", 80), v4("a", 4000));
    let (ours, theirs) = (a.prepare(), b.prepare());
    a.say(Message::Prepared { conn: ours.conn, generation: ours.generation });
    b.commit(&theirs);
    assert_eq!(a.message(), Message::Commit { conn: ours.conn, generation: ours.generation });
    x.has_nothing_to_hear();
    let stat = backend.stat();
    assert_eq!(stat["lanes"]["direct"], 1, "{stat}");
    assert_eq!([vport(&stat, "a", "vni"), vport(&stat, "x", "vni")], [100, 200], "{stat}");
    assert!(!backend.log().contains("panicked"), "{}", backend.log());
}
