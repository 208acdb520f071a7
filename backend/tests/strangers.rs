//! Who comes to the soft fabric's port without having been expected is turned away, by name, and harms nobody.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use vsocket_backend::fabric::soft::listener::MAX_STRANGERS;
use vsocket_backend::fabric::soft::mpa::{Binding, Frame, Kind};
use vsocket_backend::fabric::soft::{Options, Soft};
use vsocket_backend::fabric::{Event, Fabric, Refusal, Secret, Signal, WorkId};

fn soft() -> Soft {
    Soft::new(SocketAddr::from(([127, 0, 0, 1], 0)), Options::default()).unwrap()
}

fn request(secret: Secret, vni: u32) -> Vec<u8> {
    let mut out = Vec::new();
    Frame::emit(Kind::Request, false, &Binding { vni, secret }.emit(), &mut out);
    out
}

fn with(mut bytes: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    bytes[at] = byte;
    bytes
}

/// Polls until someone is refused.
fn refusal(fabric: &mut Soft) -> Refusal {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if let Some(Event::Refused { reason, .. }) = fabric.poll() {
            return reason;
        }
    }
    panic!("nobody was refused");
}

#[test]
fn each_kind_of_stranger_is_named_counted_and_hung_up_on() {
    let (mut fabric, mut friend) = (soft(), soft());
    let (here, there) = (fabric.open_domain(), friend.open_domain());
    let now = Instant::now();
    let (qp, offer) = fabric.expect(here, 100, [1; 32], now).unwrap();
    fabric.expect(here, 100, [2; 32], now).unwrap();
    let dialled = friend.dial(there, 100, [1; 32], &offer, now).unwrap().0;
    let mut connected = false;
    while !connected {
        connected = matches!(fabric.poll(), Some(Event::Connected { .. }));
        while friend.poll().is_some() {}
    }

    let table: [(Vec<u8>, Refusal); 10] = [
        (b"GET / HTTP/1.1\r\nHost: fabric\r\n\r\n".to_vec(), Refusal::BadMagic),
        (vec![0; 4096], Refusal::BadMagic),
        (with(request([9; 32], 100), 17, 2), Refusal::WrongVersion),
        (with(request([9; 32], 100), 16, 0x80), Refusal::WrongVersion),
        (with(request([9; 32], 100), 21, 7), Refusal::WrongVersion),
        (with(request([9; 32], 100), 18, 0xff), Refusal::Oversized),
        (with(request([9; 32], 100), 19, 5), Refusal::Malformed),
        (request([9; 32], 100), Refusal::UnknownSecret),
        (request([1; 32], 100), Refusal::ReusedSecret),
        (request([2; 32], 200), Refusal::WrongVni),
    ];
    for (bytes, expected) in table {
        let before = fabric.refused(expected);
        let mut stranger = TcpStream::connect(fabric.address()).unwrap();
        stranger.write_all(&bytes).unwrap();
        assert_eq!(refusal(&mut fabric), expected);
        assert_eq!(fabric.refused(expected), before + 1);
        // Hung up on without a word.
        stranger.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(stranger.read(&mut [0; 1]), Ok(0) | Err(_)), "{expected:?}");
        // And the friend does not notice.
        friend.post_send(dialled, WorkId(1), &[b"still here"], Signal::No).unwrap();
        friend.flush();
        loop {
            if let Some(Event::Received { qp: from, payload }) = fabric.poll() {
                assert_eq!((from, payload), (qp, b"still here".as_slice()));
                break;
            }
        }
    }
    // A secret that was presented for the wrong VNI has served.
    TcpStream::connect(fabric.address()).unwrap().write_all(&request([2; 32], 100)).unwrap();
    assert_eq!(refusal(&mut fabric), Refusal::ReusedSecret);
}

#[test]
fn a_silent_stranger_is_given_up_on_time() {
    let mut fabric = soft();
    let mut slow = TcpStream::connect(fabric.address()).unwrap();
    slow.write_all(&request([1; 32], 100)[..30]).unwrap();
    let deadline = loop {
        assert_eq!(fabric.poll(), None);
        if let Some(deadline) = fabric.next_deadline() {
            break deadline;
        }
    };
    fabric.handle_timeout(deadline - Duration::from_millis(1));
    assert_eq!(fabric.poll(), None, "not before its time");
    fabric.handle_timeout(deadline);
    assert_eq!(refusal(&mut fabric), Refusal::TimedOut);
    assert_eq!(fabric.next_deadline(), None);
}

#[test]
fn a_crowd_of_strangers_does_not_keep_a_friend_out() {
    let (mut fabric, mut friend) = (soft(), soft());
    let (here, there) = (fabric.open_domain(), friend.open_domain());
    let crowd: Vec<TcpStream> =
        (0..MAX_STRANGERS).map(|_| TcpStream::connect(fabric.address()).unwrap()).collect();
    let now = Instant::now();
    let (_, offer) = fabric.expect(here, 100, [1; 32], now).unwrap();
    friend.dial(there, 100, [1; 32], &offer, now).unwrap();
    assert_eq!(refusal(&mut fabric), Refusal::Crowded);
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        assert!(Instant::now() < deadline);
        if let Some(Event::Connected { .. }) = fabric.poll() {
            break;
        }
        while friend.poll().is_some() {}
    }
    drop(crowd);
    assert_eq!(refusal(&mut fabric), Refusal::HungUp);
}

#[test]
fn a_request_in_crumbs_is_still_a_request() {
    let mut fabric = soft();
    let here = fabric.open_domain();
    let (qp, _) = fabric.expect(here, 100, [1; 32], Instant::now()).unwrap();
    let mut friend = TcpStream::connect(fabric.address()).unwrap();
    friend.set_nodelay(true).unwrap();
    for byte in request([1; 32], 100) {
        friend.write_all(&[byte]).unwrap();
        assert_eq!(fabric.poll(), None);
    }
    let mut reply = [0; 26];
    friend.set_nonblocking(true).unwrap();
    while friend.read(&mut reply).is_err() {
        assert_eq!(fabric.poll(), None);
    }
    assert_eq!(&reply[..16], b"MPA ID Rep Frame");
    // The zero-length WRITE that makes it ready: length 14, tagged, last.
    friend.write_all(&[0, 14, 0xc1, 0x40]).unwrap();
    friend.write_all(&[0; 16]).unwrap();
    let connected = loop {
        if let Some(event) = fabric.poll() {
            break matches!(event, Event::Connected { qp: it } if it == qp);
        }
    };
    assert!(connected);
}
