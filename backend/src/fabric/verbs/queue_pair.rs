//! A reliable connected queue pair: its states, and what is posted to it.

use std::io;
use std::mem::zeroed;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ibv_create_qp, ibv_destroy_qp, ibv_modify_qp, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr,
    ibv_qp_attr_mask as Mask, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_recv_wr, ibv_send_flags,
    ibv_send_wr, ibv_sge, ibv_wr_opcode, rdma_t,
};

use super::completion::Cq;
use super::connect::Address;
use super::device::{check, checked};
use super::memory::{Mr, Pd};

/// Largest inline payload that is asked for: more gains nothing, as it is copied twice.
const INLINE: [u32; 4] = [256, 128, 64, 0];

/// 4.096 µs × 2^14 = 67 ms until a packet is sent again, seven times: a lost peer is noticed within half a second, about
/// when the daemon gives it up.
const TIMEOUT: u8 = 14;
const RETRIES: u8 = 7;

/// A receiver without room is asked again for ever: whether its process lives is for the daemon to find out.
const RNR_RETRIES: u8 = 7;

/// 0.08 ms until a receiver without room is asked again.
const RNR_TIMER: u8 = 6;

/// A message, or a write, for the device.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Its number, which comes back in its completion.
    pub id: u64,
    /// The device's address and the key of what is sent.
    pub from: (u64, u32),
    /// Its length.
    pub len: u32,
    /// Address and key at the peer of a WRITE; `None` for a SEND.
    pub to: Option<(u64, u32)>,
    /// Whether its success is to be reported.
    pub signal: bool,
}

/// Where packets go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The port of the device.
    pub port: u8,
    /// The index of our GID in the port's table.
    pub gid_index: u8,
    /// Our MTU.
    pub mtu: u8,
}

/// See the module.
pub struct QueuePair {
    raw: NonNull<ibv_qp>,
    inline: u32,
    depth: u32,
    wrs: Vec<ibv_send_wr>,
    sges: Vec<ibv_sge>,
    cq: Arc<Cq>,
    _pd: Arc<Pd>,
}

// SAFETY: libibverbs may be called from any thread; the pointer is freed only by the one `drop`. The pointers inside the
// scratch lists are only meaningful during `post`.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// A queue pair that has not been given a peer; `depth` requests each way.
    pub fn new(pd: &Arc<Pd>, cq: Arc<Cq>, sends: u32, receives: u32) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::InvalidInput);
        for inline in INLINE {
            // SAFETY: plain integers and pointers, for which zeros are valid and mean "none".
            let mut wanted: ibv_qp_init_attr = unsafe { zeroed() };
            wanted.send_cq = cq.raw();
            wanted.recv_cq = cq.raw();
            wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
            wanted.cap.max_send_wr = sends;
            wanted.cap.max_recv_wr = receives;
            wanted.cap.max_send_sge = 1;
            wanted.cap.max_recv_sge = 1;
            wanted.cap.max_inline_data = inline;
            // SAFETY: domain and completion queue are alive, and kept so by our clones; the attributes are ours.
            match checked(unsafe { ibv_create_qp(pd.raw(), &mut wanted) }) {
                Ok(raw) => {
                    let inline = wanted.cap.max_inline_data.min(inline);
                    let (wrs, sges) = (Vec::new(), Vec::new());
                    return Ok(Self { raw, inline, depth: sends, wrs, sges, cq, _pd: pd.clone() });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        // SAFETY: a queue pair that was given out is initialised, and alive.
        unsafe { self.raw.as_ref().qp_num }
    }

    /// What tells it from others in a device's reports.
    pub fn token(&self) -> usize {
        self.raw.as_ptr() as usize
    }

    /// How many bytes may be sent inline.
    pub fn inline(&self) -> u32 {
        self.inline
    }

    /// How many requests its send queue holds.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Its completion queue.
    pub fn completions(&self) -> &Cq {
        &self.cq
    }

    fn modify(&mut self, mut attributes: ibv_qp_attr, mask: Mask) -> io::Result<()> {
        // SAFETY: the queue pair is alive, and the attributes that the mask names have been set.
        check(unsafe { ibv_modify_qp(self.raw.as_ptr(), &mut attributes, mask.0 as i32) })
    }

    fn attributes(state: ibv_qp_state::Type) -> ibv_qp_attr {
        // SAFETY: plain integers, for which zeros are valid.
        let mut attributes: ibv_qp_attr = unsafe { zeroed() };
        attributes.qp_state = state;
        attributes
    }

    /// Takes receive requests from here on. Peers may WRITE where regions allow it.
    pub fn init(&mut self, way: Way) -> io::Result<()> {
        let mut to = Self::attributes(ibv_qp_state::IBV_QPS_INIT);
        to.port_num = way.port;
        to.qp_access_flags = 2;
        let mask = Mask::IBV_QP_STATE | Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT;
        self.modify(to, mask | Mask::IBV_QP_ACCESS_FLAGS)
    }

    /// Receives from the peer, and sends to it, beginning with packet `psn`.
    pub fn connect(&mut self, way: Way, psn: u32, peer: &Address) -> io::Result<()> {
        let mut to = Self::attributes(ibv_qp_state::IBV_QPS_RTR);
        to.path_mtu = u32::from(way.mtu.min(peer.mtu));
        to.dest_qp_num = peer.qpn;
        to.rq_psn = peer.psn;
        to.min_rnr_timer = RNR_TIMER;
        to.ah_attr.is_global = 1;
        to.ah_attr.grh.dgid.raw = peer.gid;
        to.ah_attr.grh.sgid_index = way.gid_index;
        to.ah_attr.grh.hop_limit = 64;
        to.ah_attr.dlid = peer.lid;
        to.ah_attr.port_num = way.port;
        let mask = Mask::IBV_QP_STATE | Mask::IBV_QP_AV | Mask::IBV_QP_PATH_MTU | Mask::IBV_QP_DEST_QPN;
        let mask = mask | Mask::IBV_QP_RQ_PSN | Mask::IBV_QP_MAX_DEST_RD_ATOMIC | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(to, mask)?;
        let mut to = Self::attributes(ibv_qp_state::IBV_QPS_RTS);
        to.sq_psn = psn;
        to.timeout = TIMEOUT;
        to.retry_cnt = RETRIES;
        to.rnr_retry = RNR_RETRIES;
        let mask = Mask::IBV_QP_STATE | Mask::IBV_QP_TIMEOUT | Mask::IBV_QP_RETRY_CNT;
        self.modify(to, mask | Mask::IBV_QP_RNR_RETRY | Mask::IBV_QP_SQ_PSN | Mask::IBV_QP_MAX_QP_RD_ATOMIC)
    }

    /// Hands all requests to the device at once.
    pub fn post(&mut self, requests: &[Request]) -> io::Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        self.wrs.clear();
        self.sges.clear();
        for request in requests {
            let (addr, lkey) = request.from;
            self.sges.push(ibv_sge { addr, length: request.len, lkey });
            self.wrs.push(self.work_request(request));
        }
        // Only now do both lists stay where they are.
        let (wrs, sges) = (self.wrs.as_mut_ptr(), self.sges.as_mut_ptr());
        for (at, wr) in self.wrs.iter_mut().enumerate() {
            if wr.num_sge > 0 {
                wr.sg_list = sges.wrapping_add(at);
            }
            if at + 1 < requests.len() {
                wr.next = wrs.wrapping_add(at + 1);
            }
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; `wrs` is a list of well-formed requests that ends in null, each with at most
        // one piece. The device reaches the pieces' memory by their keys only, so a registration keeps it in place (see
        // `memory`); inline pieces are read during the call from the send buffer, which the caller holds.
        check(unsafe { ibv_post_send(self.raw.as_ptr(), wrs, &mut bad) })
    }

    fn work_request(&self, request: &Request) -> ibv_send_wr {
        // SAFETY: plain integers, pointers and unions of them, for which zeros are valid.
        let mut wr: ibv_send_wr = unsafe { zeroed() };
        wr.wr_id = request.id;
        wr.num_sge = i32::from(request.len > 0);
        let mut flags = ibv_send_flags(0);
        if request.signal {
            flags |= ibv_send_flags::IBV_SEND_SIGNALED;
        }
        match request.to {
            Some((remote_addr, rkey)) => {
                wr.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
                wr.wr.rdma = rdma_t { remote_addr, rkey };
            }
            None => {
                wr.opcode = ibv_wr_opcode::IBV_WR_SEND;
                // Only of SENDs: their bytes lie in our own buffer at the address that the device knows too.
                if request.len <= self.inline {
                    flags |= ibv_send_flags::IBV_SEND_INLINE;
                }
            }
        }
        wr.send_flags = flags.0;
        wr
    }

    /// Gives the device a place to receive a message in.
    pub fn post_receive(&mut self, id: u64, into: &Mr, offset: usize, len: u32) -> io::Result<()> {
        debug_assert!(into.contains(offset, len as usize));
        let mut sge = ibv_sge { addr: into.base() + offset as u64, length: len, lkey: into.lkey() };
        let mut wr = ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive, and the request is a list of one that is read during the call. The device
        // writes by the key only, into memory that the registration keeps.
        check(unsafe { ibv_post_recv(self.raw.as_ptr(), &mut wr, &mut bad) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: given back once; nothing uses it after this.
        if unsafe { ibv_destroy_qp(self.raw.as_ptr()) } != 0 {
            tracing::debug!("a queue pair of a lost device stays behind");
        }
    }
}
