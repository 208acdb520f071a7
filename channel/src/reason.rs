//! Why a connection is not on a lane, by name: the one list that every program prints from.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $code:literal, $name:literal;)*) => {
        /// Why a connection stays on, or returned to, kernel TCP.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Reason { $($(#[doc = $doc])+ $variant = $code,)* }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The reason with this code on the wire.
            pub fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// Its name, as `vsocket ss` and the counters show it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

reasons! {
    /// The peer has not opened its end: it is not preloaded, or below its threshold.
    PeerNotOpen = 1, "peer-not-open";
    /// The local address does not belong to the vport.
    AddressNotYours = 2, "address-not-yours";
    /// No guest and no directory entry has the remote address.
    PeerUnknown = 3, "peer-unknown";
    /// The remote host's backend cannot be reached.
    PeerHostDown = 4, "peer-host-down";
    /// No agent answers.
    NoAgent = 5, "no-agent";
    /// The agent has no backend.
    NoBackend = 6, "no-backend";
    /// The kernel's byte counters do not agree with what was seen.
    Untrackable = 7, "untrackable";
    /// The kernel socket is not an established TCP connection.
    NotEstablished = 8, "not-established";
    /// Out of memory for rings, or the vport's quota is used up.
    Quota = 9, "quota";
    /// The operator drains the vport.
    Drained = 10, "drained";
    /// The backend went away.
    BackendGone = 11, "backend-gone";
    /// The peer's backend went away.
    PeerBackendGone = 12, "peer-backend-gone";
    /// A part did not answer within the liveness bound.
    NotAnswering = 13, "not-answering";
    /// An index, frame or message that cannot be.
    Violation = 14, "violation";
    /// The peer left the ring.
    PeerLeft = 15, "peer-left";
    /// The connection is ending.
    Ending = 16, "ending";
    /// A call used the descriptor in a way that only kernel TCP serves.
    Unsupported = 17, "unsupported-call";
    /// The kernel counters were not stable, or another call was inside the kernel; it will be tried again.
    Busy = 18, "busy";
    /// The tuple is open already, by another connection of the vport.
    TupleTaken = 19, "tuple-taken";
    /// The generation was overtaken by another.
    Superseded = 20, "superseded";
    /// The program could not map the shared memory.
    NoMemory = 21, "no-memory";
    /// Opened, and the answer is outstanding.
    Opening = 22, "opening";
    /// The fabric refused or lost the queue pair.
    FabricDown = 23, "fabric-down";
    /// The two hosts have different fabrics.
    FabricMismatch = 24, "fabric-mismatch";
    /// The fabric's device has no more queue pairs, regions or memory.
    FabricFull = 25, "fabric-full";
    /// The guest, a virtual machine, has not registered memory for rings.
    NoRingMemory = 26, "no-ring-memory";
    /// The guest, a virtual machine, stands still, and its memory is not touched.
    GuestPaused = 27, "guest-paused";
    /// A program that was executed inherits it, and knows of no lane.
    Inherited = 28, "inherited";
    /// It was passed to a process (`SCM_RIGHTS`), which may know of no lane.
    Passed = 29, "passed";
    /// Its program uses `io_uring`, whose calls nobody sees.
    IoUring = 30, "io-uring";
    /// Its program uses asynchronous I/O (AIO), whose calls nobody sees.
    Aio = 31, "aio";
    /// Another process may hold it as well, which knows of no lane; it is looked at again.
    HeldByOthers = 32, "held-by-others";
}

impl Reason {
    /// Whether the connection goes back to TCP whole, for good: with what was not received of a ring, as somebody is to find all
    /// of it in the kernel's socket.
    pub fn is_whole(self) -> bool {
        matches!(self, Self::Inherited | Self::Passed | Self::IoUring | Self::Aio)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn codes_and_names_are_unique() {
        for (i, a) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_code(*a as u16), Some(*a));
            assert!(Reason::ALL[i + 1..].iter().all(|b| a.name() != b.name() && *a as u16 != *b as u16));
        }
        assert_eq!(Reason::from_code(0), None);
    }
}
