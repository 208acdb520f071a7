//! The daemon's core: vports, pairing, flows. Not built yet.

#![forbid(unsafe_code)]

use crate::config::Config;

/// Why the daemon cannot run, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The core is still to be written.
    #[error("the configuration of {host} is good, but the daemon's core is not built yet")]
    NotBuilt {
        /// This host.
        host: String,
    },
}

/// Runs until told to stop.
pub fn run(config: Config) -> Result<(), Error> {
    Err(Error::NotBuilt { host: config.host.to_string() })
}
