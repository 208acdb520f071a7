//! What the preloaded library does inside an application: which descriptors it follows, when it opens them with the
//! agent, and how calls on them are served.
//!
//! The number that the application holds is the kernel socket's own. A connection is followed from `connect` or
//! `accept` on by counting; when it has proved worth it, it is opened with the agent, and gets a [`conn::Conn`]: from
//! then on its calls go through [`crate::endpoint::Endpoint`], on whichever lane it is.
//!
//! Nothing here writes to the application's standard streams, and no lock is held across a wait.

pub mod cancel;
pub mod client;
pub mod conn;
pub mod descriptors;
pub mod epoll;
pub mod exec;
pub mod fork;
pub mod found;
pub mod kin;
pub mod pipes;
pub mod poll;
pub mod socket;
pub mod table;
pub mod unseen;
pub mod wait;

/// What a hook is to do with a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome<T> {
    /// The call was served, with this result.
    Done(Result<T, rustix::io::Errno>),
    /// The call is the kernel's: make the real one.
    Bypass,
}
