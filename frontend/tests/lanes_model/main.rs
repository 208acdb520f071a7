//! Explores the lane state machines: the product's `TxState` and `RxState` for one direction, in every state that an
//! environment of kernel, backends, pairing, deaths and resets can bring about, within small bounds.
//!
//! - `world`: a state, its invariants, and the bounds. `anchor`: the kernel's queue of real bytes.
//! - `sender`, `receiver`: the endpoints' procedures, cut wherever another party may come between.
//! - `fate`: everything that is done to them. `explore`: the search, and the search for states without a way out.
//!
//! A way out is one that the endpoints can go alone: neither backends nor pairing nor a further misfortune count.
//!
//! What is taken for granted: a record is stored as a whole (see `TornRecord` for what else), ring memory is quarantined,
//! and the memory model's part of the Dekker rule is loom's (channel); here loads and stores are single steps in one order.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]

mod anchor;
mod explore;
mod fate;
mod receiver;
mod sender;
mod world;

use explore::explore;
use world::{Config, Lane, Mutation};

/// Three bytes of two values, each of which is the escape byte of the other; rings of two; an anchor that holds a frame and
/// two bytes.
const PLAIN: Config = Config {
    lane: Lane::Fabric,
    data: &[0x55, 0xaa, 0xaa, 0x55],
    bytes: 3,
    cuts: &[1, 2, 3, 4],
    ring: 2,
    anchor: 18,
    generations: 1,
    parts: false,
    sender_dies: false,
    receiver_dies: false,
    aborts: false,
    mutation: None,
};
const DIRECT: Config = Config { lane: Lane::Direct, ..PLAIN };
const TWICE: Config = Config { generations: 2, ..PLAIN };
const ALL: Config = Config { sender_dies: true, receiver_dies: true, aborts: true, parts: true, ..PLAIN };

/// The tenant sends what would be the REWIND of a stay that began with its first byte: after a byte that makes it the escape.
const MIMIC: Config = Config {
    data: b"\xaa\x55VS\x01\0\0\0\x01\0\0\0\0\0\0\0\x01z",
    bytes: 18,
    cuts: &[1, 17],
    ring: 17,
    anchor: 34,
    ..PLAIN
};

/// The tenant sends what would be the REWIND of a stay that began with its first byte, had this been its escape byte.
const FRAME: Config = Config {
    data: b"\x55VS\x01\0\0\0\x01\0\0\0\0\0\0\0\0z",
    bytes: 17,
    cuts: &[16],
    ring: 17,
    anchor: 34,
    ..DIRECT
};

fn clean(name: &str, config: Config) {
    let begun = std::time::Instant::now();
    match explore(&config) {
        Ok(seen) => println!("{name}: {seen} in {:.1?}", begun.elapsed()),
        Err(finding) => panic!("{name}: {config:?}\n{finding}"),
    }
}

fn caught(mutation: Mutation, config: Config, harm: &str) {
    match explore(&Config { mutation: Some(mutation), ..config }) {
        Ok(seen) => panic!("{mutation:?} was not found out in {seen}"),
        Err(finding) => {
            println!("{mutation:?}:\n{finding}");
            assert!(finding.what.contains(harm), "{mutation:?} should do other harm: {harm}");
        }
    }
}

#[test]
fn a_direct_lane_is_clean() {
    clean("direct, deaths and resets", Config { lane: Lane::Direct, generations: 2, ..ALL });
    clean("direct, four stays", Config { generations: 4, bytes: 4, ..DIRECT });
}

#[test]
fn a_fabric_lane_is_clean() {
    clean("fabric, two stays", Config { parts: true, ..TWICE });
    clean("fabric, resets", Config { aborts: true, ..PLAIN });
}

#[test]
fn deaths_of_senders_are_clean() {
    clean("fabric, the sender dies", Config { sender_dies: true, ..TWICE });
}

#[test]
fn deaths_of_receivers_are_clean() {
    clean("fabric, the receiver dies", Config { receiver_dies: true, ..PLAIN });
    clean("fabric, deaths and resets", Config { bytes: 2, ..ALL });
}

#[test]
fn a_tenant_that_writes_frames_is_clean() {
    clean("direct, mimic", Config { lane: Lane::Direct, generations: 2, parts: true, ..MIMIC });
    clean("direct, frame", Config { generations: 2, parts: true, ..FRAME });
    clean("fabric, mimic", Config { parts: true, ..MIMIC });
}

#[test]
fn mutations_of_the_stay_are_caught() {
    caught(Mutation::SameEscape, DIRECT, "is judged Ok(Wait)");
    caught(Mutation::SameEscape, FRAME, "is judged Ok(Rewound");
    caught(Mutation::NoSecondLook, DIRECT, "goes to the application");
    caught(Mutation::NoSecondLook, PLAIN, "goes to the application");
    caught(Mutation::BlindConfirm, PLAIN, "goes to the application");
    caught(Mutation::LateAcks, PLAIN, "is judged Ok(Wait)");
    caught(Mutation::ShutUnshut, DIRECT, "the last stay has ended");
    caught(Mutation::ShutUnshut, PLAIN, "the last stay has ended");
}

#[test]
fn a_wait_for_the_backend_is_caught() {
    caught(Mutation::WaitForBackend, PLAIN, "accepted bytes have no way");
}

#[test]
fn mutations_of_the_receiver_are_caught() {
    caught(Mutation::KeepDuplicates, PLAIN, "is delivered after");
    caught(Mutation::StaleStay, PLAIN, "the receiver stands at");
    caught(Mutation::NoCheckAfterRaw, PLAIN, "the receiver stands at");
    caught(Mutation::Uncapped, DIRECT, "goes to the application");
    caught(Mutation::HeadFirst, PLAIN, "REWIND does not fit");
}

#[test]
fn mutations_about_deaths_are_caught() {
    let sender = Config { sender_dies: true, ..PLAIN };
    let receiver = Config { receiver_dies: true, ..PLAIN };
    caught(Mutation::SenderUnrecovered, sender, "is taken for byte");
    caught(Mutation::TornRecord, sender, "is taken for byte");
    caught(Mutation::PublishFirst, sender, "the anchor ends at S");
    caught(Mutation::PublishFirst, Config { lane: Lane::Direct, ..sender }, "lies outside the stay");
    caught(Mutation::DeadGuestFin, sender, "EOF at");
    caught(Mutation::ReceiverUnrecovered, receiver, "is taken for byte");
    caught(Mutation::FrameLeft, receiver, "goes to the application");
    caught(Mutation::ConsumeFirst, receiver, "the kernel has seen other bytes");
}

/// LANES.md asks for a look after each guarded read. The look before the next read finds the same.
#[test]
fn the_look_after_a_raw_read_may_be_left_out() {
    clean("fabric, no look after a raw read", Config { mutation: Some(Mutation::NoLookAfterRaw), ..PLAIN });
}

#[test]
#[ignore = "minutes and gigabytes: cargo test --release -p vsocket-frontend --test lanes_model -- --ignored --nocapture --test-threads 1"]
fn larger_bounds_are_clean() {
    clean("direct, deaths and resets", Config { lane: Lane::Direct, bytes: 4, generations: 3, ..ALL });
    clean("fabric, four stays", Config { bytes: 4, generations: 4, parts: true, ..PLAIN });
    clean("fabric, deaths and resets", Config { generations: 2, bytes: 4, ..ALL });
    clean("fabric, mimic, deaths", Config { sender_dies: true, receiver_dies: true, parts: true, ..MIMIC });
}
