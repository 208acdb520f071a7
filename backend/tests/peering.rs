//! Two backends' control connections: who gets in, who does not and why, and what happens when one goes away.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use vsocket_backend::certs;
use vsocket_backend::config::{Backends, Fabric, Peer, Tls};
use vsocket_backend::peer::message::{HostName, MessageError, PeerMessage};
use vsocket_backend::peer::{Down, Error, PeerEvent, PeerHandle, Peers, Refusal, TlsError};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A directory with certificates for h1, h2, h3; gone afterwards.
struct Lab(PathBuf);

impl Lab {
    fn new() -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vsocket-peers-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        certs::create(&path, &["h1", "h2", "h3"].map(str::to_owned)).unwrap();
        Self(path)
    }

    fn tls(&self, host: &str) -> Tls {
        let file = |name: String| self.0.join(name);
        Tls { ca: file("ca.pem".into()), cert: file(format!("{host}.pem")), key: file(format!("{host}.key")) }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A port that nobody has, for a peer that must be configured before it listens.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn name(host: &str) -> HostName {
    HostName::new(host).unwrap()
}

struct Node {
    peers: Peers,
    handle: PeerHandle,
    events: Receiver<PeerEvent>,
    wakes: Arc<AtomicU32>,
}

fn start(tls: Tls, host: &str, listen: SocketAddr, boot_id: u64, peers: &[(&str, SocketAddr)]) -> Node {
    let peer = |&(host, control): &(&str, SocketAddr)| {
        let number = host.as_bytes()[1] - b'0';
        Peer { host: name(host), vtep: [192, 0, 2, number].into(), control }
    };
    let fabric = Fabric::Soft { listen: "127.0.0.1:1".parse().unwrap() };
    let config = Backends { tls, listen, fabric, peers: peers.iter().map(peer).collect() };
    let wakes = Arc::new(AtomicU32::new(0));
    let theirs = Arc::clone(&wakes);
    let wake = move || {
        theirs.fetch_add(1, Ordering::Relaxed);
    };
    let (peers, events) = Peers::start(&config, &name(host), boot_id, wake).unwrap();
    Node { handle: peers.handle(), peers, events, wakes }
}

impl Node {
    /// The next event that `wanted` makes something of.
    fn wait<T>(&self, what: &str, wanted: impl Fn(&PeerEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.events.recv_deadline(deadline) {
                Ok(event) => {
                    if let Some(found) = wanted(&event) {
                        return found;
                    }
                }
                Err(_) => panic!("{what} did not come"),
            }
        }
    }

    fn up(&self, host: &str) -> u64 {
        self.wait("up", |event| match event {
            PeerEvent::Up { host: it, boot_id } if it.as_str() == host => Some(*boot_id),
            _ => None,
        })
    }

    fn down(&self) -> Down {
        self.wait("down", |event| match event {
            PeerEvent::Down { reason, .. } => Some(*reason),
            _ => None,
        })
    }

    fn refused(&self) -> Refusal {
        self.wait("refusal", |event| match event {
            PeerEvent::Refused { reason, .. } => Some(*reason),
            _ => None,
        })
    }

    fn message(&self) -> PeerMessage {
        self.wait("message", |event| match event {
            PeerEvent::Message { message, .. } => Some(message.clone()),
            _ => None,
        })
    }
}

/// h1 and h2, knowing each other.
fn both(lab: &Lab) -> (Node, Node, SocketAddr) {
    let (at1, at2) = (free_port(), free_port());
    let h1 = start(lab.tls("h1"), "h1", at1, 1, &[("h2", at2)]);
    let h2 = start(lab.tls("h2"), "h2", at2, 2, &[("h1", at1)]);
    (h1, h2, at2)
}

/// Waits until the two have settled on one connection, and tries it in both directions.
fn settle(h1: &Node, h2: &Node) {
    let deadline = Instant::now() + Duration::from_secs(10);
    for n in 0.. {
        assert!(Instant::now() < deadline);
        h1.handle.send(&name("h2"), PeerMessage::Ping { n });
        h2.handle.send(&name("h1"), PeerMessage::Ping { n });
        let arrives = |node: &Node| {
            let until = Instant::now() + Duration::from_millis(100);
            while let Ok(event) = node.events.recv_deadline(until) {
                if matches!(event, PeerEvent::Message { message: PeerMessage::Ping { n: it }, .. } if it == n)
                {
                    return true;
                }
            }
            false
        };
        let (one, two) = (arrives(h1), arrives(h2));
        if one && two {
            return;
        }
    }
}

#[test]
fn two_backends_meet_and_talk_in_order() {
    let lab = Lab::new();
    let (h1, h2, _) = both(&lab);
    assert_eq!((h1.up("h2"), h2.up("h1")), (2, 1));
    settle(&h1, &h2);
    for n in 1000..3000 {
        h1.handle.send(&name("h2"), PeerMessage::Pong { n });
    }
    for n in 1000..3000 {
        assert!(h2.message() == PeerMessage::Pong { n });
    }
    assert!(h2.wakes.load(Ordering::Relaxed) > 0);
    h1.handle.send(&name("h9"), PeerMessage::Ping { n: 1 });
}

#[test]
fn simultaneous_dials_end_in_one_connection() {
    let lab = Lab::new();
    for _ in 0..5 {
        let (h1, h2, _) = both(&lab);
        settle(&h1, &h2);
        // Quiet from here on: neither end changes its mind again.
        std::thread::sleep(Duration::from_millis(150));
        while h1.events.try_recv().is_ok() {}
        settle(&h1, &h2);
        let late: Vec<_> = h1.events.try_iter().chain(h2.events.try_iter()).collect();
        assert!(!late.iter().any(|event| matches!(event, PeerEvent::Down { .. })), "{late:?}");
    }
}

#[test]
fn a_backend_that_comes_back_is_up_within_a_second() {
    let lab = Lab::new();
    let (h1, mut h2, at2) = both(&lab);
    settle(&h1, &h2);
    for boot_id in 10..13 {
        // Each time another start of the process, while h1 still has the last one's link.
        h2 = start_again(&lab, &h1, boot_id);
    }
    drop(h2);
    // And on the same port, after a death.
    let h2 = start_again_at(&lab, &h1, 20, at2);
    settle(&h1, &h2);
}

fn start_again(lab: &Lab, h1: &Node, boot_id: u64) -> Node {
    start_again_at(lab, h1, boot_id, free_port())
}

fn start_again_at(lab: &Lab, h1: &Node, boot_id: u64, listen: SocketAddr) -> Node {
    let started = Instant::now();
    let h2 = start(lab.tls("h2"), "h2", listen, boot_id, &[("h1", h1.peers.address())]);
    h1.wait("the new start", |event| match event {
        PeerEvent::Up { boot_id: it, .. } if *it == boot_id => Some(()),
        _ => None,
    });
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    h2
}

#[test]
fn death_is_told_at_once() {
    let lab = Lab::new();
    let (h1, h2, _) = both(&lab);
    settle(&h1, &h2);
    let died = Instant::now();
    drop(h2);
    assert_eq!(h1.down(), Down::Closed);
    assert!(died.elapsed() < Duration::from_secs(3), "{:?}", died.elapsed());
}

#[test]
fn a_reset_link_comes_back() {
    let lab = Lab::new();
    let (h1, h2, _) = both(&lab);
    settle(&h1, &h2);
    h1.handle.reset(&name("h2"));
    assert_eq!(h1.down(), Down::Reset);
    assert_eq!(h1.up("h2"), 2);
    settle(&h1, &h2);
}

/// What is signed by whom, for whom, until when.
fn identity(dir: &Path, ca: &Issuer<'_, KeyPair>, host: &str, last_year: i32) -> (PathBuf, PathBuf) {
    let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(last_year, 1, 1);
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, ca).unwrap();
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let (at_cert, at_key) = (dir.join(format!("x{number}.pem")), dir.join(format!("x{number}.key")));
    fs::write(&at_cert, cert.pem()).unwrap();
    fs::write(&at_key, key.serialize_pem()).unwrap();
    (at_cert, at_key)
}

/// Another authority of the same kind.
fn other_authority() -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Issuer::new(params, KeyPair::generate().unwrap())
}

/// The lab's own authority: what counts is its name and its key.
fn lab_authority(lab: &Lab) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "vsocket lab CA");
    let key = KeyPair::from_pem(&fs::read_to_string(lab.0.join("ca.key")).unwrap()).unwrap();
    Issuer::new(params, key)
}

type Client = StreamOwned<ClientConnection, TcpStream>;

/// A hand-made client that calls h1.
fn client(lab: &Lab, address: SocketAddr, identity: Option<(PathBuf, PathBuf)>) -> Client {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(lab.0.join("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = vec![CertificateDer::from_pem_file(cert).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key).unwrap()).unwrap()
        }
    };
    let name = ServerName::try_from("h1").unwrap();
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}

fn encoded(message: &PeerMessage) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

fn hello(host: &str) -> Vec<u8> {
    encoded(&PeerMessage::Hello { host: name(host), boot_id: 99 })
}

/// h1 alone, waiting for an h2 that this test plays.
fn h1_waiting(lab: &Lab) -> Node {
    start(lab.tls("h1"), "h1", "127.0.0.1:0".parse().unwrap(), 1, &[("h2", free_port())])
}

fn own(lab: &Lab, host: &str) -> (PathBuf, PathBuf) {
    (lab.0.join(format!("{host}.pem")), lab.0.join(format!("{host}.key")))
}

#[test]
fn every_wrong_caller_is_refused_by_name() {
    let lab = Lab::new();
    let h1 = h1_waiting(&lab);
    let at = h1.peers.address();
    let (ours, theirs) = (lab_authority(&lab), other_authority());
    let table = [
        ("nobody", None, hello("h2"), Refusal::NoCertificate),
        ("foreign", Some(identity(&lab.0, &theirs, "h2", 2090)), hello("h2"), Refusal::WrongAuthority),
        ("expired", Some(identity(&lab.0, &ours, "h2", 2021)), hello("h2"), Refusal::Expired),
        ("stranger", Some(own(&lab, "h3")), hello("h3"), Refusal::UnknownPeer),
        ("impostor", Some(own(&lab, "h3")), hello("h2"), Refusal::HelloMismatch),
        ("rude", Some(own(&lab, "h2")), encoded(&PeerMessage::Ping { n: 1 }), Refusal::NoHello),
        (
            "old",
            Some(own(&lab, "h2")),
            vec![0, 0, 0, 73, 0, 1, 0, 9],
            Refusal::Message(MessageError::WrongVersion { version: 9 }),
        ),
        (
            "long",
            Some(own(&lab, "h2")),
            vec![0xff, 0xff, 0xff, 0xff, 0, 1, 0, 2],
            Refusal::Message(MessageError::Oversized { length: u32::MAX }),
        ),
    ];
    for (who, identity, first, expected) in table {
        let mut caller = client(&lab, at, identity);
        // Being refused may show in either call, or only in the one after.
        let _ = caller.write_all(&first).and_then(|()| caller.flush());
        assert_eq!(h1.refused(), expected, "{who}");
        let mut rest = Vec::new();
        let _ = caller.read_to_end(&mut rest);
    }
    // And whoever is right still gets in.
    let mut caller = client(&lab, at, Some(own(&lab, "h2")));
    caller.write_all(&hello("h2")).unwrap();
    assert_eq!(h1.up("h2"), 99);
}

#[test]
fn callers_that_speak_no_tls_are_refused_by_name() {
    let lab = Lab::new();
    let h1 = h1_waiting(&lab);
    let mut plain = TcpStream::connect(h1.peers.address()).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: h1\r\n\r\n").unwrap();
    assert_eq!(h1.refused(), Refusal::NotTls);
    drop(TcpStream::connect(h1.peers.address()).unwrap());
    assert_eq!(h1.refused(), Refusal::HungUp);
    let silent = TcpStream::connect(h1.peers.address()).unwrap();
    assert_eq!(h1.refused(), Refusal::TimedOut);
    drop(silent);
}

#[test]
fn a_peer_that_breaks_the_protocol_is_put_down_by_name() {
    let lab = Lab::new();
    let h1 = h1_waiting(&lab);
    let long = vec![0, 1, 0, 0, 0, 2, 0, 2];
    let short = vec![0, 0, 0, 7, 0, 2, 0, 2];
    let table = [
        (long, Down::Message(MessageError::Oversized { length: 1 << 16 })),
        (short, Down::Message(MessageError::WrongLength { kind: 2, length: 7, expected: 8 })),
        (vec![0, 0, 0, 8, 0, 77, 0, 2], Down::Message(MessageError::UnknownType { kind: 77 })),
        (vec![0, 0, 0, 8, 0, 2, 0, 3], Down::Message(MessageError::WrongVersion { version: 3 })),
        (hello("h2"), Down::SecondHello),
    ];
    for (bytes, expected) in table {
        let mut caller = client(&lab, h1.peers.address(), Some(own(&lab, "h2")));
        caller.write_all(&hello("h2")).unwrap();
        assert_eq!(h1.up("h2"), 99);
        caller.write_all(&encoded(&PeerMessage::Ping { n: 5 })).unwrap();
        caller.write_all(&bytes).unwrap();
        assert!(h1.message() == PeerMessage::Ping { n: 5 }, "what came before is still heard");
        assert_eq!(h1.down(), expected);
    }
}

#[test]
fn a_listener_with_anothers_certificate_is_not_believed() {
    let lab = Lab::new();
    // h1 believes to dial h2, but h3 answers.
    let h3 = start(lab.tls("h3"), "h3", "127.0.0.1:0".parse().unwrap(), 3, &[]);
    let h1 = start(lab.tls("h1"), "h1", "127.0.0.1:0".parse().unwrap(), 1, &[("h2", h3.peers.address())]);
    assert_eq!(h1.refused(), Refusal::WrongName);
    assert_eq!(h3.refused(), Refusal::RejectedByPeer);
}

#[test]
fn bad_files_keep_the_daemon_from_starting() {
    let lab = Lab::new();
    let load = |tls: Tls| {
        let listen = "127.0.0.1:0".parse().unwrap();
        let fabric = Fabric::Soft { listen: "127.0.0.1:1".parse().unwrap() };
        let config = Backends { tls, listen, fabric, peers: Vec::new() };
        match Peers::start(&config, &name("h1"), 1, || ()) {
            Err(Error::Tls(error)) => error,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it started"),
        }
    };
    let good = lab.tls("h1");
    assert!(matches!(load(lab.tls("h2")), TlsError::NotOurs { .. }));
    assert!(matches!(load(Tls { key: lab.tls("h2").key, ..good.clone() }), TlsError::Identity { .. }));
    assert!(matches!(
        load(Tls { key: good.cert.clone(), ..good.clone() }),
        TlsError::Pem { what: "private key", .. }
    ));
    assert!(matches!(
        load(Tls { ca: good.key.clone(), ..good.clone() }),
        TlsError::Pem { what: "certificate", .. }
    ));
    assert!(matches!(
        load(Tls { cert: lab.0.join("none"), ..good }),
        TlsError::Pem { what: "certificate", .. }
    ));
}
