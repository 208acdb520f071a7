//! How two queue pairs find each other: what travels beside the fabric, and the first messages inside it.
//!
//! ```text
//! expects                               dials
//!    | -- offer: Address  (control) ----> |   both queue pairs exist; the dialler's is ready to send
//!    | <- answer: Address (control) ----- |
//!    | ======= greeting: secret ========> |   the expecting end speaks first: only it knows that both are ready
//!    | <====== greeting: secret ========= |
//! connected                            connected, when its greeting is acknowledged or something else comes
//! ```
//!
//! The addresses are trusted as far as the control connection is. That the packets come from who was meant is shown by
//! the secret, in both directions.

#![forbid(unsafe_code)]

use subtle::ConstantTimeEq;

use crate::fabric::{Endpoint, Error, Kind, Secret};

/// Where a queue pair is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Its number, 24 bits.
    pub qpn: u32,
    /// Its first packet's number, 24 bits.
    pub psn: u32,
    /// Its port's address.
    pub gid: [u8; 16],
    /// Its port's local identifier, on InfiniBand.
    pub lid: u16,
    /// Its MTU, 1 (256 bytes) to 5 (4096).
    pub mtu: u8,
}

const LEN: usize = 4 + 4 + 16 + 2 + 1;

impl Address {
    /// For the other end.
    pub fn endpoint(&self) -> Endpoint {
        let mut form = [0; LEN];
        form[..4].copy_from_slice(&self.qpn.to_be_bytes());
        form[4..8].copy_from_slice(&self.psn.to_be_bytes());
        form[8..24].copy_from_slice(&self.gid);
        form[24..26].copy_from_slice(&self.lid.to_be_bytes());
        form[26] = self.mtu;
        Endpoint::new(Kind::Verbs, &form)
    }

    /// From the other end.
    pub fn parse(endpoint: &Endpoint) -> Result<Self, Error> {
        if endpoint.kind() != Some(Kind::Verbs) {
            return Err(Error::WrongKind { theirs: endpoint.kind_name(), ours: Kind::Verbs.name() });
        }
        let bytes = endpoint.bytes();
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[8..24]);
        let lid = u16::from_be_bytes([bytes[24], bytes[25]]);
        let address = Self { qpn: word(0), psn: word(4), gid, lid, mtu: bytes[26] };
        let bad = |what| Err(Error::BadEndpoint(what));
        match address {
            Self { qpn, .. } if !(2..1 << 24).contains(&qpn) => bad("queue pair number"),
            Self { psn, .. } if psn >= 1 << 24 => bad("packet number"),
            Self { mtu, .. } if !(1..=5).contains(&mtu) => bad("MTU"),
            Self { gid, lid: 0, .. } if gid == [0; 16] => bad("address"),
            _ if bytes[LEN..].iter().any(|&byte| byte != 0) => bad("padding"),
            address => Ok(address),
        }
    }
}

/// What the first byte of every message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The user's message follows.
    Data = 0,
    /// A greeting follows.
    Greeting = 1,
    /// The sender closes its end.
    Farewell = 2,
}

impl Tag {
    /// What a message is.
    pub fn of(message: &[u8]) -> Option<Self> {
        match message.first()? {
            0 => Some(Self::Data),
            1 => Some(Self::Greeting),
            2 => Some(Self::Farewell),
            _ => None,
        }
    }
}

/// The length of a greeting.
pub const GREETING: usize = 4 + 4 + 32;

/// Which end greets: an echo is no greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The end that expects.
    Expects = 1,
    /// The end that dials.
    Dials = 2,
}

/// A greeting: tag, version and role, VNI, secret.
pub fn greeting(role: Role, vni: u32, secret: &Secret) -> [u8; GREETING] {
    let mut out = [0; GREETING];
    out[..4].copy_from_slice(&[Tag::Greeting as u8, 1, role as u8, 0]);
    out[4..8].copy_from_slice(&vni.to_be_bytes());
    out[8..].copy_from_slice(secret);
    out
}

/// Whether a message is the greeting that the other end owes. Every byte is compared.
pub fn is_greeting(message: &[u8], from: Role, vni: u32, secret: &Secret) -> bool {
    message.ct_eq(&greeting(from, vni, secret)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Address = Address { qpn: 17, psn: 0xab_cdef, gid: [0xfe; 16], lid: 3, mtu: 5 };

    #[test]
    fn addresses_survive_the_way_and_nonsense_is_named() {
        assert_eq!(Address::parse(&Endpoint::parse(&GOOD.endpoint().emit())).unwrap(), GOOD);
        let bad = |at: usize, byte: u8| {
            let mut wire = GOOD.endpoint().emit();
            wire[at] = byte;
            Address::parse(&Endpoint::parse(&wire)).unwrap_err().to_string()
        };
        assert!(bad(1, 1).ends_with("queue pair number"));
        assert!(bad(5, 1).ends_with("packet number"));
        assert!(bad(27, 0).ends_with("MTU") && bad(27, 6).ends_with("MTU"));
        assert!(bad(28, 1).ends_with("padding"));
        assert_eq!(bad(0, 1), "the other end has soft, this one verbs");
        let nowhere = Address { gid: [0; 16], lid: 0, ..GOOD };
        assert!(Address::parse(&nowhere.endpoint()).is_err());
    }

    #[test]
    fn only_the_right_greeting_is_one() {
        let secret = [7; 32];
        let message = greeting(Role::Dials, 100, &secret);
        assert!(is_greeting(&message, Role::Dials, 100, &secret));
        assert!(!is_greeting(&message, Role::Expects, 100, &secret), "an echo");
        assert!(!is_greeting(&message, Role::Dials, 101, &secret));
        assert!(!is_greeting(&message, Role::Dials, 100, &[8; 32]));
        assert!(!is_greeting(&message[..39], Role::Dials, 100, &secret));
        assert_eq!((Tag::of(&message), Tag::of(&[]), Tag::of(&[9])), (Some(Tag::Greeting), None, None));
    }
}
