//! What pairing wants done, as values.

#![forbid(unsafe_code)]

use vsocket_channel::Side;
use vsocket_channel::message::{Lane, Message, Tuple};

use super::EndId;
use crate::config::Mac;
use crate::peer::message::{PeerMessage, RegionRef};
use crate::slab::SegmentId;

/// A flow that is to carry a stay to another host and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowStart {
    /// Our number for it.
    pub flow: u64,
    /// The peer.
    pub peer: u32,
    /// The peer's number for it.
    pub peer_flow: u64,
    /// The guest's end.
    pub end: EndId,
    /// The tenant network.
    pub vni: u32,
    /// The connection, as our guest sees it.
    pub tuple: Tuple,
    /// Our guest's and the far guest's MAC.
    pub macs: [Mac; 2],
    /// The generation.
    pub generation: u32,
    /// Its memory.
    pub segment: SegmentId,
    /// Where the peer receives, if it has said so. Then our own region is told by `Prepared`, else by `Prepare`.
    pub rx: Option<RegionRef>,
}

/// A relay that is to carry a stay between two guests of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayStart {
    /// Our number for it.
    pub relay: u64,
    /// The guests.
    pub vports: [u32; 2],
    /// The generation.
    pub generation: u32,
    /// The memory of each.
    pub segments: [SegmentId; 2],
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Send to a vport's agent.
    Tell {
        /// Whose agent.
        vport: u32,
        /// What.
        message: Message,
    },
    /// Send `Prepare` with the slab's descriptors.
    Prepare {
        /// To whom.
        end: EndId,
        /// The generation.
        generation: u32,
        /// Its memory.
        segment: SegmentId,
        /// The receiver's side.
        side: Side,
        /// `Direct` or `Fabric`.
        lane: Lane,
    },
    /// A segment is free; without `reuse` it is lost.
    Release {
        /// Which.
        segment: SegmentId,
        /// Nobody uses it any more.
        reuse: bool,
    },
    /// Send to another backend.
    Peer {
        /// Which.
        peer: u32,
        /// What.
        message: PeerMessage,
    },
    /// A queue pair for this tenant is wanted.
    NeedQp {
        /// To which peer.
        peer: u32,
        /// For which tenant.
        vni: u32,
    },
    /// Make a flow, and tell the peer where it receives.
    FlowStart(FlowStart),
    /// The peer of this flow receives there.
    FlowReady {
        /// Which flow.
        flow: u64,
        /// Where.
        rx: RegionRef,
    },
    /// Write nothing more for this flow, and tell the peer so behind the last byte.
    FlowStop {
        /// Which.
        flow: u64,
    },
    /// Forget a flow, if there is one of this number.
    FlowDrop {
        /// Which.
        flow: u64,
    },
    /// Make a relay. Its guests are told to commit after this.
    RelayStart(RelayStart),
    /// Touch the memory of a relay's guests no more, and forget it.
    RelayStop {
        /// Which.
        relay: u64,
    },
}
