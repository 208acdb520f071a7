//! The hooked symbols, by family.

mod control;
mod lifetime;
mod readiness;
mod transfer;
