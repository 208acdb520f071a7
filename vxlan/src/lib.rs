//! VXLAN segments: the packets one backend sends to another.
//!
//! A segment is, from the outside in, a VXLAN header (RFC 7348), an Ethernet II header, an IPv4 (RFC 791) or
//! IPv6 (RFC 8200) header and a TCP header (RFC 9293) whose sequence number, acknowledgement, window and flags
//! are the fabric lane's own protocol. The outer Ethernet, IP and UDP headers are no part of a segment: the fabric
//! takes their place. For a capture [`outer`] writes them.
//!
//! Each protocol has two levels. `Packet` reads and writes fields of a buffer and judges nothing; `Repr` is the
//! small, valid meaning, with `parse` and `emit`. A backend uses neither: it calls [`encapsulate`] and
//! [`decapsulate`] of [`segment`].
//!
//! The crate does no I/O, allocates nothing, and has no unsafe code. What it reads comes from another host, so
//! every reason to refuse a packet has its own variant of [`Error`], and no input makes it panic. It checks form
//! only: whether a VNI, an address or a flow belongs to a tenant is the backend's question.
//!
//! # Example
//!
//! ```
//! use vsocket_vxlan::{Flags, MAX_HEADER_LEN, PayloadAt, Segment, Stay, Vni, decapsulate, encapsulate};
//!
//! let segment = Segment {
//!     vni: Vni::new(42)?,
//!     src_mac: [2, 0, 0, 0, 0, 1],
//!     dst_mac: [2, 0, 0, 0, 0, 2],
//!     src: "10.0.0.1:40000".parse().unwrap(),
//!     dst: "10.0.0.2:6379".parse().unwrap(),
//!     seq: 0,
//!     ack: 0,
//!     window: 1 << 20,
//!     flags: Flags::ACK | Flags::PSH,
//!     stay: Stay { generation: 1, open: None },
//! };
//! let mut buffer = [0; MAX_HEADER_LEN + 4];
//! let len = encapsulate(&segment, b"ping", &mut buffer)?;
//!
//! let (read, header_len, payload_len) = decapsulate(&buffer[..len], PayloadAt::Inline)?;
//! assert_eq!(read, segment);
//! assert_eq!(&buffer[header_len..][..payload_len], b"ping");
//! # Ok::<(), vsocket_vxlan::Error>(())
//! ```
//!
//! # The panic contract of `Packet`
//!
//! After `check_len` (or `new_checked`) has succeeded, no accessor panics. `new_unchecked` is for a buffer the
//! caller has sized himself, as one does before `emit`; on a shorter one the accessors panic. Every `parse`
//! checks the length again.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod bytes;
pub mod error;
pub mod ethernet;
mod flags;
pub mod header;
pub mod ipv4;
pub mod ipv6;
pub mod lane;
pub mod outer;
pub mod segment;
pub mod tcp;
pub mod udp;

pub use error::Error;
pub use header::Vni;
pub use lane::{Stay, StayOpen};
pub use outer::Outer;
pub use segment::{
    MAX_HEADER_LEN, MAX_PAYLOAD, PayloadAt, Segment, decapsulate, encapsulate, encapsulate_header,
    encapsulate_summed,
};
pub use tcp::{Flags, MAX_WINDOW, WINDOW_SHIFT};

/// TCP's number in the protocol field of IPv4 and the next header field of IPv6 (RFC 9293, section 3.1).
pub const PROTOCOL_TCP: u8 = 6;

/// UDP's number there (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;
