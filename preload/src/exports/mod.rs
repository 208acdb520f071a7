//! The hooked symbols, by family.

mod control;
mod lifetime;
mod number;
mod readiness;
mod stdio;
mod transfer;
