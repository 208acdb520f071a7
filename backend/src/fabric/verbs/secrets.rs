//! Secrets that have been used.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use subtle::ConstantTimeEq;

use crate::fabric::Secret;

/// So many are remembered: a queue pair is set up within seconds, and each has its own.
const REMEMBERED: usize = 1024;

/// See the module.
#[derive(Default)]
pub struct Secrets(VecDeque<Secret>);

impl Secrets {
    /// Whether this one is new; from now on it is not.
    #[must_use]
    pub fn take(&mut self, secret: &Secret) -> bool {
        let known = self.0.iter().fold(false, |found, other| found | bool::from(other.ct_eq(secret)));
        if !known {
            if self.0.len() == REMEMBERED {
                self.0.pop_front();
            }
            self.0.push_back(*secret);
        }
        !known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_serves_once() {
        let mut secrets = Secrets::default();
        assert!(secrets.take(&[1; 32]) && secrets.take(&[2; 32]) && !secrets.take(&[1; 32]));
    }
}
