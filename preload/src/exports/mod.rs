//! The hooked symbols, by family.

mod control;
mod exec;
mod lifetime;
mod number;
mod print;
mod readiness;
mod stdio;
mod thread;
mod transfer;
mod unseen;
