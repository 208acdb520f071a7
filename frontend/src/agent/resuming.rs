//! Connections that an agent before had. That one is dead, and all that it knew, but the records are in memory that their program
//! maps as well: it brings them, with the lanes' state of each connection, and says which of them are on TCP both ways. Those
//! are opened again, with generations that were not used so far.
//!
//! A record whose connection is not on TCP yet, or is past its end, is only not given to another, until it is closed.

use super::Agent;
use super::course::Course;
use super::registry::{Conn, Program};
use crate::kernel;
use crate::record::RECORDS;
use rustix::fd::OwnedFd;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::{debug, warn};
use vsocket_channel::reason::Reason;

impl Agent {
    /// A program with the records that it brings, if it brings any that can be taken over, else with new ones.
    pub(super) fn make_program(&mut self, pid: i32, uid: u32, brought: Vec<OwnedFd>) -> io::Result<Program> {
        let Ok(brought) = <[OwnedFd; 2]>::try_from(brought) else { return Program::new(pid, uid) };
        // Those of a program that is here are its own, also while its connections are being ended.
        let taken = self.registry.programs.values().any(|program| program.is_in(&brought[0]));
        let resumed = if taken {
            Err(io::Error::from(io::ErrorKind::AlreadyExists))
        } else {
            Program::resumed(pid, uid, brought)
        };
        resumed.or_else(|error| {
            warn!(%error, pid, "records that a program has brought");
            self.registry.totals.drop("records-refused");
            Program::new(pid, uid)
        })
    }

    /// Goes on with a connection of an agent before. False: its record is not one of those.
    pub(super) fn resume(&mut self, from: u64, program: u64, fd: &OwnedFd, record: u32, last: u32) -> bool {
        let Some(owner) = self.registry.programs.get(&program) else { return false };
        let Some(state) = owner.records.record(record).filter(|_| owner.reserved.contains(&record)) else {
            return false;
        };
        let connector = state.connector.load(Ordering::Relaxed) != 0;
        let past = state.past(Duration::from_millis(1));
        let unknown = state.unknown.load(Ordering::Relaxed) != 0;
        let checked = kernel::tuple(fd).map_err(|_| Reason::NotEstablished);
        let checked = checked.and_then(|tuple| Ok((tuple, self.check(fd, (0, 0), connector, false)?)));
        let Some(owner) = self.registry.programs.get_mut(&program) else { return false };
        match checked {
            Ok((tuple, cookie)) => {
                debug!(program, record, last, "resumed");
                owner.reserved.remove(&record);
                owner.declined.remove(&tuple);
                let course = if unknown {
                    Course::of_unknown_past(last, self.now)
                } else {
                    Course::resumed(last, self.now)
                };
                self.insert(Conn { past, ..Conn::new(program, record, from, tuple, cookie, course) });
            }
            // It stays on TCP, and its record is its own until it is closed.
            Err(reason) => {
                if let Some(tuple) =
                    kernel::tuple(fd).ok().filter(|_| owner.declined.len() < RECORDS as usize)
                {
                    owner.declined.insert(tuple, reason);
                }
                self.registry.totals.decline(reason);
            }
        }
        true
    }

    /// A connection that only an agent before had was closed: nobody uses its record any more. False: it is none of those.
    pub(super) fn give_up(&mut self, program: u64, record: u32) -> bool {
        let Some(owner) = self.registry.programs.get_mut(&program) else { return false };
        let was = owner.reserved.remove(&record);
        if was {
            owner.release_record(record, false);
        }
        was
    }
}
