//! Fork: the child shares the parent's connections, and talks to the agent over a socket of its own.

use super::client;
use super::descriptors;
use super::kin;
use crate::carrier::Carrier;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

static OWNER: AtomicU32 = AtomicU32::new(0);
static PENDING: Mutex<Option<Carrier>> = Mutex::new(None);

extern "C" fn before() {
    let carrier = client::before_fork();
    if let Ok(mut pending) = PENDING.lock() {
        *pending = carrier;
    }
}

extern "C" fn in_parent() {
    client::forked();
    if let Ok(mut pending) = PENDING.lock() {
        *pending = None;
    }
}

extern "C" fn in_child() {
    OWNER.store(std::process::id(), Ordering::Relaxed);
    let carrier = PENDING.lock().ok().and_then(|mut p| p.take());
    client::after_fork(carrier);
}

extern "C" fn reserve() {
    descriptors::reserve();
    kin::in_child();
}

extern "C" fn count() {
    kin::before();
}

/// Before the program has a second thread, and in each child before it has one: room for our descriptors. And before it
/// can change its environment: where the agent is.
pub fn at_load() {
    let _ = client::agent_path();
    descriptors::reserve();
    // SAFETY: as in `install`. A child has a descriptor table of the size of what it inherits.
    unsafe { libc::pthread_atfork(Some(count), None, Some(reserve)) };
}

/// Begins to follow forks of this process.
pub fn install() {
    OWNER.store(std::process::id(), Ordering::Relaxed);
    // SAFETY: the handlers are functions of this library, which is never unloaded.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
}

/// Whether this is a child that shares its parent's memory (`vfork`): it must not touch the parent's table.
pub fn is_foreign() -> bool {
    let owner = OWNER.load(Ordering::Relaxed);
    owner != 0 && owner != std::process::id()
}
