//! An open device: its limits, its ports, what it says by itself.

use std::ffi::{CStr, c_int};
use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ___ibv_query_port, ibv_ack_async_event, ibv_async_event, ibv_close_device, ibv_context, ibv_event_type,
    ibv_free_device_list, ibv_get_async_event, ibv_get_device_list, ibv_get_device_name, ibv_open_device,
    ibv_port_state, ibv_query_device, ibv_query_gid,
};

/// What a device allows, as it says itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Queue pairs.
    pub max_qp: usize,
    /// Registered regions.
    pub max_mr: usize,
    /// Bytes of one region.
    pub max_mr_size: u64,
    /// Completion queues.
    pub max_cq: usize,
    /// Protection domains.
    pub max_pd: usize,
    /// Work requests in one queue.
    pub max_qp_wr: u32,
    /// Entries of one completion queue.
    pub max_cqe: u32,
    /// Pieces of one work request.
    pub max_sge: u32,
    /// Shared receive queues, and work requests in one.
    pub max_srq: usize,
    /// See [`max_srq`](Self::max_srq).
    pub max_srq_wr: u32,
    /// Ports, numbered from 1.
    pub ports: u8,
}

/// A port's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// Whether traffic passes.
    pub active: bool,
    /// Ethernet, so that only its GID names it.
    pub ethernet: bool,
    /// The MTU in force, as verbs number it: 1 is 256 bytes, 5 is 4096.
    pub mtu: u8,
    /// The local identifier; 0 on Ethernet.
    pub lid: u16,
    /// The longest message.
    pub max_message: u32,
}

/// What a device reports unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incident {
    /// It is gone, or will not work again without being opened anew.
    Gone,
    /// A port went down.
    PortDown(u8),
    /// The peer of this queue pair broke a rule.
    PeerFault(usize),
    /// This queue pair is broken.
    QueuePair(usize),
    /// Nothing that changes anything here.
    Other,
}

/// An open device. Kept open by everything that was made on it.
pub struct Context {
    raw: NonNull<ibv_context>,
    name: String,
}

// SAFETY: libibverbs may be called from any thread, with any number of them on one context; the pointer is freed only by
// `drop`, of which there is one.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// The value or the system's error, for functions that return a null pointer on failure.
pub(super) fn checked<T>(pointer: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(io::Error::last_os_error)
}

/// For functions that return an error number. (Some also return -1 and set errno.)
pub(super) fn check(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        code => Err(io::Error::from_raw_os_error(code.abs())),
    }
}

/// Calls `take` with each device that libibverbs can drive, by name, until it gives something.
fn find<T>(mut take: impl FnMut(&str, *mut rdma_sys::ibv_device) -> Option<T>) -> io::Result<Option<T>> {
    let mut count = 0;
    // SAFETY: the count is ours to write; the list is freed below, exactly once.
    let list = checked(unsafe { ibv_get_device_list(&mut count) })?;
    let mut found = None;
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has `count` entries, none of them null.
        let device = unsafe { *list.as_ptr().add(at) };
        // SAFETY: the device is alive until the list is freed, and its name with it, NUL-terminated.
        let name = unsafe { CStr::from_ptr(ibv_get_device_name(device)) };
        found = take(&name.to_string_lossy(), device);
        if found.is_some() {
            break;
        }
    }
    // SAFETY: the list came from ibv_get_device_list; opened devices hold their own reference.
    unsafe { ibv_free_device_list(list.as_ptr()) };
    Ok(found)
}

/// The names of all devices that libibverbs can drive.
pub fn names() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    find(|name, _| {
        names.push(name.to_owned());
        None::<()>
    })?;
    Ok(names)
}

impl Context {
    /// Opens the device of that name.
    pub fn open(name: &str) -> io::Result<Arc<Self>> {
        let opened = find(|other, device| {
            // SAFETY: called inside the list's life, so the device is alive.
            (other == name).then(|| checked(unsafe { ibv_open_device(device) }))
        })?;
        let raw = opened.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))?;
        let context = Self { raw, name: name.to_owned() };
        let flags = rustix::fs::fcntl_getfl(&context)?;
        rustix::fs::fcntl_setfl(&context, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Arc::new(context))
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its node.
    pub fn node(&self) -> String {
        // SAFETY: an open context names its device, which stays alive with it; the name is NUL-terminated.
        let name = unsafe { CStr::from_ptr((*(*self.raw()).device).dev_name.as_ptr()) };
        name.to_string_lossy().into_owned()
    }

    pub(super) fn raw(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }

    /// What it allows.
    pub fn limits(&self) -> io::Result<Limits> {
        // SAFETY: the attributes are plain integers, for which zeros are valid.
        let mut found: rdma_sys::ibv_device_attr = unsafe { zeroed() };
        // SAFETY: the context is open, and the attributes are ours to write.
        check(unsafe { ibv_query_device(self.raw(), &mut found) })?;
        let size = |n: c_int| usize::try_from(n).unwrap_or(0);
        let number = |n: c_int| u32::try_from(n).unwrap_or(0);
        Ok(Limits {
            max_qp: size(found.max_qp),
            max_mr: size(found.max_mr),
            max_mr_size: found.max_mr_size,
            max_cq: size(found.max_cq),
            max_pd: size(found.max_pd),
            max_qp_wr: number(found.max_qp_wr),
            max_cqe: number(found.max_cqe),
            max_sge: number(found.max_sge),
            max_srq: size(found.max_srq),
            max_srq_wr: number(found.max_srq_wr),
            ports: found.phys_port_cnt,
        })
    }

    /// The state of a port.
    pub fn port(&self, port: u8) -> io::Result<Port> {
        // SAFETY: the attributes are plain integers, for which zeros are valid.
        let mut found: rdma_sys::ibv_port_attr = unsafe { zeroed() };
        // SAFETY: the context is open, and the attributes are ours to write.
        check(unsafe { ___ibv_query_port(self.raw(), port, &mut found) })?;
        Ok(Port {
            active: found.state == ibv_port_state::IBV_PORT_ACTIVE,
            ethernet: found.link_layer == 2,
            mtu: u8::try_from(found.active_mtu).unwrap_or(1),
            lid: found.lid,
            max_message: found.max_msg_sz,
        })
    }

    /// An entry of a port's GID table.
    pub fn gid(&self, port: u8, index: u16) -> io::Result<[u8; 16]> {
        let mut gid = rdma_sys::ibv_gid { raw: [0; 16] };
        // SAFETY: the context is open, and the GID is ours to write.
        check(unsafe { ibv_query_gid(self.raw(), port, c_int::from(index), &mut gid) })?;
        // SAFETY: all 16 bytes were initialised above, and any bytes are a GID.
        Ok(unsafe { gid.raw })
    }

    /// The next thing it reports; never blocks.
    pub fn next_incident(&self) -> Option<Incident> {
        let mut event = MaybeUninit::<ibv_async_event>::uninit();
        // SAFETY: the context is open; on success the whole event has been written.
        if unsafe { ibv_get_async_event(self.raw(), event.as_mut_ptr()) } != 0 {
            // An empty queue would block. Any other error is how a removed device looks.
            let error = io::Error::last_os_error();
            return (error.kind() != io::ErrorKind::WouldBlock).then_some(Incident::Gone);
        }
        let at = event.as_ptr();
        // SAFETY: the event is initialised. Its type is read as the integer that it is in C: a newer library may name
        // types that the Rust enum does not have.
        let kind = unsafe { ptr::addr_of!((*at).event_type).cast::<u32>().read() };
        // SAFETY: the event is initialised, and a port number or pointer of zero would be valid too.
        let (port, qp) = unsafe { ((*at).element.port_num, (*at).element.qp as usize) };
        // SAFETY: got above and acknowledged once. The object it names is not touched: only its address is compared.
        unsafe { ibv_ack_async_event(event.as_mut_ptr()) };
        Some(incident(kind, port, qp))
    }
}

fn incident(kind: u32, port: c_int, qp: usize) -> Incident {
    use ibv_event_type as T;
    match kind {
        kind if kind == T::IBV_EVENT_DEVICE_FATAL as u32 => Incident::Gone,
        kind if kind == T::IBV_EVENT_PORT_ERR as u32 => Incident::PortDown(port as u8),
        kind if kind == T::IBV_EVENT_QP_ACCESS_ERR as u32 => Incident::PeerFault(qp),
        kind if kind == T::IBV_EVENT_QP_REQ_ERR as u32 => Incident::PeerFault(qp),
        kind if kind == T::IBV_EVENT_QP_FATAL as u32 => Incident::QueuePair(qp),
        _ => Incident::Other,
    }
}

impl AsFd for Context {
    /// The descriptor of its reports.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, its descriptor with it, for as long as this borrow.
        unsafe { BorrowedFd::borrow_raw((*self.raw()).async_fd) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        tracing::debug!(device = self.name, descriptor = self.as_fd().as_raw_fd(), "closing");
        // SAFETY: everything made on the context keeps an `Arc` of it, so nothing is left that uses it.
        if unsafe { ibv_close_device(self.raw()) } != 0 {
            tracing::warn!(device = self.name, "cannot close the device");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incidents_are_told_apart() {
        assert_eq!(incident(8, 0, 0), Incident::Gone);
        assert_eq!(incident(10, 2, 0), Incident::PortDown(2));
        assert_eq!(incident(3, 0, 7), Incident::PeerFault(7));
        assert_eq!(incident(1, 0, 7), Incident::QueuePair(7));
        assert_eq!(incident(9999, 0, 0), Incident::Other, "a type of a newer library");
    }

    #[test]
    fn both_manners_of_reporting_errors_are_understood() {
        assert!(check(0).is_ok());
        assert_eq!(check(libc::ENOMEM).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        assert_eq!(check(-libc::EIO).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
}
