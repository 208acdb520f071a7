//! The host side of vsocket: the library behind `vsocketd`.
//!
//! A backend serves the guests of one host. It is split by what may block and what may not: the data thread owns the
//! [`fabric`] and never waits for anything but readiness; the [`peer`] thread speaks TLS with other backends and hands
//! over whole, checked messages. Configuration is read once, in full, before either starts ([`config`]).
//!
//! | module | what it is for |
//! |---|---|
//! | [`config`] | what the operator wrote, checked, with file, line and key in each error |
//! | [`directory`] | (VNI, inner address) → host and MAC |
//! | [`fabric`] | moving bytes between hosts in verbs semantics: `fabric::verbs`, [`fabric::soft`], [`fabric::loopback`] |
//! | [`peer`] | the authenticated control connection between two backends |
//! | [`certs`] | a lab's certificate authority |
//! | [`carrier`], [`vport`] | control messages to and from a guest's agent, and its attachment |
//! | [`slab`] | the shared memory of rings, and its pool |
//! | [`pairing`] | who meets whom, prepare and commit, withdraw and leave: sans-IO |
//! | [`flow`] | one connection's bytes between rings and another host: sans-IO |
//! | [`relay`] | one connection's bytes between the rings of two guests here: sans-IO |
//! | `machine` | a guest that is a virtual machine: its memory, and who calls from it |
//! | `front` | a VM's vsock device, a process of its own: `vsocketd vm-front` |
//! | [`capture`] | segments to a file, for `vsocketd capture` |
//! | [`operator`], [`metrics`] | what a person may ask, and the counters |
//! | [`cli`], [`daemon`] | the command line, and the loop that ties all together |
//!
//! Everything here runs without RDMA hardware; `fabric::loopback` needs not even a network.

pub mod capture;
pub mod carrier;
pub mod certs;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod directory;
pub mod fabric;
pub mod flow;
#[cfg(feature = "vm")]
pub mod front;
#[cfg(feature = "vm")]
pub mod machine;
pub mod metrics;
pub mod operator;
pub mod pairing;
pub mod peer;
pub mod relay;
pub mod slab;
mod slice;
pub mod vport;
