//! The control connection to another backend.

pub mod message;
