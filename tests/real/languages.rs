//! Servers in the standard libraries of Python, node, Java and Go, and a static one: each echoes what a client that knows
//! what it sent compares.

use std::fs;

use crate::common::{Program, wait_until};
use crate::kit::{self, PATHS, SOON, Site, number, on_lane, source};

const PORT: u16 = 7007;

/// The client: four connections of so many MiB each way, then one that asks and waits.
fn client(site: &Site, verb: &str, mib: u32) -> Program {
    let (ip, mib) = (site.ip(), mib.to_string());
    site.lab.start(verb, "a", &["python3", &source("echo_client.py"), &ip, &PORT.to_string(), "4", &mib])
}

/// Its rates: MB/s echoed, and round trips a second.
fn echo(site: &Site, verb: &str, mib: u32) -> (f64, f64) {
    let out = client(site, verb, mib).ok();
    (number(&out, "mbyte/s"), number(&out, "round trips/s"))
}

/// A server that the client's connections go over lanes to: plainly, then accelerated.
fn echoes(test: &str, serve: impl Fn(&Site, &str) -> Program) {
    for path in PATHS {
        let site = Site::new(test, path);
        let mut trips = Vec::new();
        // Four connections of 256 MiB each way, and one that asks and waits.
        site.compare("echo of 4 x 256 MiB", "MB/s", on_lane(5, 1800 << 20), |verb| {
            let server = serve(&site, verb);
            let (rate, turns) = echo(&site, verb, 256);
            trips.push(turns);
            kit::stop(server);
            rate
        });
        kit::figure(test, "echo of 64 bytes", path, "round trips/s", (trips[0], trips[1]));
    }
}

fn python(kind: &'static str) -> impl Fn(&Site, &str) -> Program {
    move |site, verb| {
        let script = source("echo_server.py");
        site.serve(verb, PORT, &["python3", &script, kind, &site.ip(), &PORT.to_string()])
    }
}

#[test]
fn python_asyncio() {
    if kit::have(&["python3:python3"]) {
        echoes("python-asyncio", python("asyncio"));
    }
}

#[test]
fn python_socketserver_threading() {
    if kit::have(&["python3:python3"]) {
        echoes("python-threading", python("threading"));
    }
}

#[test]
fn python_socketserver_forking() {
    if kit::have(&["python3:python3"]) {
        echoes("python-forking", python("forking"));
    }
}

#[test]
fn node() {
    if kit::have(&["node:nodejs", "python3:python3"]) {
        echoes("node", |site, verb| {
            site.serve(verb, PORT, &["node", &source("echo.js"), &site.ip(), &PORT.to_string()])
        });
    }
}

#[test]
fn java_nio() {
    if !kit::have(&["javac:openjdk-17-jdk-headless", "python3:python3"]) {
        return;
    }
    echoes("java-nio", |site, verb| {
        let classes = site.at("classes");
        if !fs::exists(&classes).unwrap_or(false) {
            kit::prepare(&["javac", "-d", &classes, &source("Echo.java")]);
        }
        site.serve(
            verb,
            PORT,
            &["java", "-Xshare:auto", "-cp", &classes, "Echo", &site.ip(), &PORT.to_string()],
        )
    });
}

/// A server whose program does not load the library: its clients stay on TCP, and say why.
fn stays_on_tcp(site: &Site, server: &[&str]) {
    let before = site.lab.before(site.path);
    let then = site.lab.stat("a");
    let server = site.serve("run", PORT, server);
    let client = client(site, "run", 32);
    // As long as a connection is there, it says so itself.
    let shows =
        || site.lab.ss("a").iter().any(|l| l.reason() == "peer-not-open" && l.lanes() == ("tcp", "tcp"));
    wait_until(SOON, "the reason is shown", shows);
    client.ok();
    before.none_upgraded();
    let declined = site.lab.stat("a").declined("peer-not-open") - then.declined("peer-not-open");
    assert_eq!(declined, 5, "connections on TCP as the peer has not opened them");
    kit::stop(server);
}

#[test]
fn go() {
    if !kit::have(&["go:golang-go", "python3:python3"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("go", path);
        let program = site.at("echo");
        let build = format!("HOME={} go build -o {program} {}", site.at(""), source("echo.go"));
        kit::prepare(&["sh", "-c", &build]);
        stays_on_tcp(&site, &[&program, &site.ip(), &PORT.to_string()]);
    }
}

#[test]
fn static_binary() {
    if !kit::have(&["gcc:gcc", "python3:python3"]) {
        return;
    }
    for path in PATHS {
        let site = Site::new("static", path);
        let program = site.at("echo");
        kit::prepare(&["gcc", "-O2", "-static", "-pthread", "-o", &program, &source("echo.c")]);
        stays_on_tcp(&site, &[&program, &site.ip(), &PORT.to_string()]);
    }
}
