//! `libvsocket.so`: POSIX manners. Each hook is an ABI shim of a few lines: it asks `vsocket_frontend::program` how the
//! call is to be served, and either makes the real call or turns the answer into a return value and errno.
//!
//! What is never done here: write to the application's standard streams, allocate or log on a data call, start a
//! thread, install a signal handler. Without an agent every call is the kernel's.
//!
//! To add a hook: a `hook!` in the family's file under `exports/` (or, for a variadic function, in `exports/control.rs`),
//! with the decision in `vsocket_frontend::program`.
#![allow(clippy::missing_safety_doc, non_camel_case_types)]

pub mod args;
#[cfg(not(test))]
#[macro_use]
mod hook;
// As soon as a test links these they would override libc inside the test itself.
#[cfg(not(test))]
mod exports;
