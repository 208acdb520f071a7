//! Completion queues, and the channel that wakes a sleeper.
//!
//! A queue that is *armed* puts one event into the channel for its next completion, and is armed no more once that event
//! is read. So a sleeper loses nothing if every queue is armed after it was found empty, and looked at once more.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel, ibv_create_cq,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_get_cq_event, ibv_poll_cq, ibv_req_notify_cq, ibv_wc,
    ibv_wc_status,
};

use super::device::{Context, check, checked};
use crate::fabric::{Disconnect, Fault};

/// Completions taken from a queue at a time.
pub const BATCH: usize = 32;

/// What wakes a sleeper, for all completion queues of a device.
pub struct Channel {
    raw: NonNull<ibv_comp_channel>,
    context: Arc<Context>,
}

// SAFETY: libibverbs may be called from any thread; the pointer is freed only by the one `drop`.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    /// A new one, whose descriptor never blocks.
    pub fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open, and kept so by our clone.
        let raw = checked(unsafe { ibv_create_comp_channel(context.raw()) })?;
        let channel = Self { raw, context: context.clone() };
        let flags = rustix::fs::fcntl_getfl(&channel)?;
        rustix::fs::fcntl_setfl(&channel, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Arc::new(channel))
    }

    /// The token of a queue that is armed no more.
    pub fn next_event(&self) -> Option<usize> {
        let (mut cq, mut token) = (ptr::null_mut::<ibv_cq>(), ptr::null_mut());
        // SAFETY: the channel is alive, and both places are ours to write.
        if unsafe { ibv_get_cq_event(self.raw.as_ptr(), &mut cq, &mut token) } != 0 {
            return None;
        }
        // SAFETY: the event was got from this queue just now, and destroying a queue waits for this acknowledgement.
        unsafe { ibv_ack_cq_events(cq, 1) };
        Some(token as usize)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is alive, its descriptor with it, for as long as this borrow.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every completion queue keeps an `Arc` of its channel, so none is left.
        if unsafe { ibv_destroy_comp_channel(self.raw.as_ptr()) } != 0 {
            tracing::debug!("a completion channel of a lost device stays behind");
        }
    }
}

/// How one work request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The number it was posted with.
    pub id: u64,
    /// The verbs status; 0 is success.
    pub status: u32,
    /// Bytes received.
    pub len: usize,
}

impl Completion {
    /// Whether it did what it should.
    pub fn is_good(&self) -> bool {
        self.status == ibv_wc_status::IBV_WC_SUCCESS
    }

    /// Why the queue pair is no more, if this was the first bad one.
    pub fn reason(&self) -> Disconnect {
        use ibv_wc_status as S;
        match self.status {
            S::IBV_WC_REM_ACCESS_ERR | S::IBV_WC_REM_INV_REQ_ERR => Disconnect::Terminated(Fault::Refused),
            // No work of ours failed before: the receiving side has broken the queue pair.
            S::IBV_WC_WR_FLUSH_ERR => Disconnect::PeerFault(Fault::Refused),
            S::IBV_WC_RETRY_EXC_ERR | S::IBV_WC_RNR_RETRY_EXC_ERR => Disconnect::Io(io::ErrorKind::TimedOut),
            S::IBV_WC_LOC_LEN_ERR => Disconnect::Malformed("a message longer than any"),
            S::IBV_WC_REM_OP_ERR | S::IBV_WC_REM_ABORT_ERR => {
                Disconnect::Io(io::ErrorKind::ConnectionAborted)
            }
            _ => Disconnect::Io(io::ErrorKind::Other),
        }
    }
}

/// A completion queue.
pub struct Cq {
    raw: NonNull<ibv_cq>,
    _channel: Arc<Channel>,
}

// SAFETY: libibverbs may be called from any thread; the pointer is freed only by the one `drop`.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    /// A queue with room for `entries`, whose events bear `token`.
    pub fn new(channel: &Arc<Channel>, entries: u32, token: usize) -> io::Result<Arc<Self>> {
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        let token = ptr::without_provenance_mut(token);
        // SAFETY: context and channel are alive, and kept so by our clone; the token is never dereferenced.
        let raw = unsafe { ibv_create_cq(channel.context.raw(), entries, token, channel.raw.as_ptr(), 0) };
        Ok(Arc::new(Self { raw: checked(raw)?, _channel: channel.clone() }))
    }

    pub(super) fn raw(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// Takes what has completed, at most [`BATCH`].
    pub fn poll(&self, out: &mut Vec<Completion>) -> io::Result<()> {
        let mut taken = [const { MaybeUninit::<ibv_wc>::uninit() }; BATCH];
        // SAFETY: the queue is alive, and there is room for as many completions as are asked for.
        let count = unsafe { ibv_poll_cq(self.raw(), BATCH as i32, taken.as_mut_ptr().cast()) };
        let count = usize::try_from(count).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        for completion in &taken[..count.min(BATCH)] {
            // SAFETY: the first `count` have been written. Number and status of a completion are always valid, the
            // length of one that failed is not, and is not used.
            let completion = unsafe { completion.assume_init_ref() };
            out.push(Completion {
                id: completion.wr_id,
                status: completion.status,
                len: completion.byte_len as usize,
            });
        }
        Ok(())
    }

    /// The next completion is to put an event into the channel.
    pub fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        check(unsafe { ibv_req_notify_cq(self.raw(), 0) })
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: the queue pair that uses it keeps an `Arc` of it, and all events were acknowledged when they were got.
        if unsafe { ibv_destroy_cq(self.raw()) } != 0 {
            tracing::debug!("a completion queue of a lost device stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_completion_tells_why() {
        let reason = |status| Completion { id: 0, status, len: 0 }.reason();
        assert_eq!(reason(10), Disconnect::Terminated(Fault::Refused));
        assert_eq!(reason(5), Disconnect::PeerFault(Fault::Refused));
        assert_eq!(reason(12), Disconnect::Io(io::ErrorKind::TimedOut));
        assert_eq!(reason(1), Disconnect::Malformed("a message longer than any"));
        assert_eq!(reason(99), Disconnect::Io(io::ErrorKind::Other));
    }
}
