//! Where a tenant's addresses are: (VNI, inner address) → host, VTEP and MAC.
//!
//! Static, from the configuration. Addresses of this host's own vports are not in it. Unsafe-free and without I/O, so
//! that a directory fed from elsewhere later has only to fill the same table.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::net::IpAddr;

use crate::config::Mac;
use crate::peer::message::HostName;

/// Where an address is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The backend there.
    pub host: HostName,
    /// That host's end of the overlay.
    pub vtep: IpAddr,
    /// The guest's inner MAC.
    pub mac: Mac,
}

/// The table.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    places: HashMap<(u32, IpAddr), Place>,
}

impl Directory {
    /// Adds an address; false, and nothing changed, if it is there already.
    pub fn insert(&mut self, vni: u32, address: IpAddr, place: Place) -> bool {
        match self.places.entry((vni, address)) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(vacant) => {
                vacant.insert(place);
                true
            }
        }
    }

    /// Where the address is, if it is known. IPv4 in IPv6's clothes is IPv4.
    pub fn find(&self, vni: u32, address: IpAddr) -> Option<&Place> {
        self.places.get(&(vni, address.to_canonical()))
    }

    /// How many addresses are known.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_may_share_addresses() {
        let place = |host| Place {
            host: HostName::new(host).unwrap(),
            vtep: "192.0.2.2".parse().unwrap(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
        };
        let address = "198.51.100.3".parse().unwrap();
        let mut directory = Directory::default();
        assert!(directory.insert(100, address, place("h2")) && directory.insert(200, address, place("h3")));
        assert!(!directory.insert(100, address, place("h4")));
        assert_eq!(directory.find(100, address), Some(&place("h2")));
        assert_eq!(directory.find(200, "::ffff:198.51.100.3".parse().unwrap()), Some(&place("h3")));
        assert_eq!(directory.find(300, address), None);
        assert_eq!((directory.len(), directory.is_empty()), (2, false));
    }
}
