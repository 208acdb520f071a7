//! The guest's side: lanes, records, waiting, the agent, and what the preloaded library decides.

#![allow(
    clippy::module_name_repetitions,
    clippy::cast_possible_truncation,
    clippy::must_use_candidate,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    clippy::missing_errors_doc,
    clippy::collapsible_if,
    clippy::cast_ptr_alignment,
    clippy::doc_markdown
)]

pub mod lane;

#[cfg(feature = "daemon")]
pub mod agent;
pub mod carrier;
#[cfg(feature = "daemon")]
pub mod cli;
pub mod endpoint;
mod holding;
#[cfg(feature = "daemon")]
pub mod host;
#[cfg(feature = "daemon")]
pub mod keeper;
pub mod kernel;
pub mod memory;
#[cfg(feature = "daemon")]
mod post;
pub mod program;
pub mod record;
#[cfg(feature = "daemon")]
mod signal;
