//! The keeper of a virtual machine's ring memory: the agent's parent, which does nothing else, so that there is nothing for
//! it to die of. The host writes to this memory; were its owner to end, the pages would go to another process while the
//! host still writes them. So the keeper frees a slab only when the host has said that it will not touch it again.
//!
//! | file | what |
//! |---|---|
//! | `registration` | what is agreed with the host (sans-IO) |
//! | `memory` | slabs: made, mapped, pinned; the only unsafe code |
//! | `pages` | page numbers, and how much memory is left |
//! | `child` | the agent's process |
//! | `token` | the proof that it is the same keeper |

#![deny(unsafe_code)]

mod child;
#[allow(unsafe_code)]
pub mod memory;
pub mod pages;
mod registration;
mod serve;
mod token;

use crate::host::Host;
use crate::post::{Parcel, Post};
use child::{Agent, Backoff};
use memory::Pinned;
use registration::{Act, Nonsense, Registration};
use rustix::fd::OwnedFd;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};
use vsocket_channel::layout::Geometry;
use vsocket_channel::message::{Message, Runs};
use vsocket_channel::reason::Reason;

/// While there is no host it is looked for this often: it is back on duty soon after it is back.
const RETRY: Duration = Duration::from_millis(100);
/// One that speaks nonsense, or does not let us register, is not bothered as often.
const RETRY_FAULTY: Duration = Duration::from_secs(1);
/// How long, at the end, the host may take to let go of what it writes to.
const ENDING: Duration = Duration::from_secs(5);

/// Why a keeper cannot work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is one, and it would lose its registration to this one.
    #[error("another keeper works in {0}: stop it, or choose a --socket elsewhere")]
    Taken(PathBuf),
    /// A system call that it rests on.
    #[error("cannot {what}")]
    System {
        /// Which.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// What a keeper is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the host is.
    pub host: Host,
    /// The agent's socket; the token is kept beside it.
    pub socket: PathBuf,
}

/// The keeper.
#[derive(Debug)]
struct Keeper {
    options: Options,
    signals: OwnedFd,
    registration: Registration<Pinned>,
    link: Option<Post>,
    connect_at: Instant,
    /// The fault that was last written to the log, so that it is written once.
    said: String,
    agent: Option<Agent>,
    start_at: Instant,
    backoff: Backoff,
    /// SIGTERM has come.
    stopping: bool,
    /// The agent has ended in order: with which status, and how long the host is waited for.
    over: Option<(u8, Instant)>,
    now: Instant,
}

/// Keeps memory, and an agent, until the agent ends in order, or SIGTERM or SIGINT comes. The agent's exit status.
///
/// # Errors
///
/// [`Error`], if there is a keeper, or the kernel refuses what the loop rests on.
pub fn run(options: Options) -> Result<u8, Error> {
    let _alone = alone(options.socket.parent().unwrap_or(Path::new("/")))?;
    let signals = crate::signal::descriptor().map_err(system("receive signals"))?;
    let token = token::read(&token::path(&options.socket));
    let now = Instant::now();
    let mut keeper = Keeper {
        options,
        signals,
        registration: Registration::new(token),
        link: None,
        connect_at: now,
        said: String::new(),
        agent: None,
        start_at: now,
        backoff: Backoff::default(),
        stopping: false,
        over: None,
        now,
    };
    info!(host = %keeper.options.host, "keeps memory");
    keeper.serve()
}

/// Makes sure that no other keeper uses the directory's token, as long as what it returns lives.
fn alone(directory: &Path) -> Result<File, Error> {
    use rustix::fs::{FlockOperation, flock};
    let file = File::open(directory).map_err(system("open the directory of the agent's socket"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Taken(directory.to_owned())),
        Err(error) => Err(system("lock the directory of the agent's socket")(error.into())),
    }
}

impl Keeper {
    // ---- the host --------------------------------------------------------------------------------------------------

    fn connect(&mut self) {
        self.connect_at = self.now + RETRY;
        match self.options.host.connect(true) {
            Ok(stream) => {
                let mut post = Post::over(stream);
                let hello = self.registration.hello(std::process::id());
                match post.send(hello, Parcel::new()) {
                    Ok(_) => self.link = Some(post),
                    Err(error) => self.say(&format!("cannot reach the host: {error}")),
                }
            }
            Err(error) => self.say(&format!("cannot open a stream to the host: {error}")),
        }
    }

    /// Writes a fault to the log, if it is not the one that was written last.
    fn say(&mut self, fault: &str) {
        if self.said == fault {
            debug!(fault, "again");
        } else {
            warn!(host = %self.options.host, "{fault}");
            fault.clone_into(&mut self.said);
        }
    }

    fn lose(&mut self, fault: &str, retry: Duration) {
        self.link = None;
        self.connect_at = self.now + retry;
        if self.registration.handle_ended() {
            self.said.clear();
        }
        self.say(fault);
    }

    fn handle_host_ready(&mut self) {
        while let Some(link) = &mut self.link {
            let asking = self.registration.current().is_none();
            match link.flush().and_then(|_| link.recv()) {
                Ok(Some(packet)) => {
                    let handled = packet.message.map_err(|_| Nonsense).and_then(|m| self.handle(m));
                    if handled == Err(Nonsense) {
                        return self.lose("the host speaks nonsense", RETRY_FAULTY);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(None) if asking => {
                    let fault = "the host does not let us register: is its vsocketd not there, or does another keeper \
                                 hold this boot's registration?";
                    return self.lose(fault, RETRY_FAULTY);
                }
                Ok(None) => return self.lose("the host has ended the registration", RETRY),
                Err(error) => return self.lose(&format!("no host: {error}"), RETRY),
            }
        }
    }

    fn handle(&mut self, message: Message) -> Result<(), Nonsense> {
        match self.registration.handle(message)? {
            Act::Registered => {
                info!("registered");
                self.said.clear();
                let path = token::path(&self.options.socket);
                if let Err(error) = token::write(&path, self.registration.token()) {
                    warn!(%error, path = %path.display(), "cannot keep the token: the next keeper will be a stranger");
                }
                self.tell_agent(message, Parcel::new());
            }
            Act::Make { slab, program, geometry } => {
                if let Err(reason) = self.make(slab, program, geometry) {
                    self.tell_host(Message::SlabRefused { slab, reason });
                }
            }
            Act::Released(slab) => self.tell_agent(Message::SlabRelease { slab }, Parcel::new()),
            Act::Nothing => {}
        }
        Ok(())
    }

    fn tell_host(&mut self, message: Message) {
        let Some(link) = &mut self.link else { return };
        if let Err(error) = link.send(message, Parcel::new()) {
            self.lose(&format!("no host: {error}"), RETRY);
        }
    }

    /// Makes a slab: first the agent has it, then the host hears where it is, so that nobody is asked to use what he does
    /// not know.
    fn make(&mut self, slab: u64, program: u64, geometry: Geometry) -> Result<(), Reason> {
        if self.agent.is_none() {
            return Err(Reason::NoAgent);
        }
        let failed = |error: &dyn std::error::Error| {
            warn!(error = crate::cli::chain(error), slab, "no ring memory");
            Reason::NoRingMemory
        };
        let memory = Pinned::make(geometry).map_err(|error| failed(&error))?;
        let numbers =
            pages::numbers(memory.address(), geometry.slab_len()).map_err(|error| failed(&error))?;
        let mut told = Vec::new();
        while told.iter().map(|(_, taken)| taken).sum::<usize>() < numbers.len() {
            let first = told.iter().map(|(_, taken)| taken).sum::<usize>();
            told.push(Runs::of(&numbers[first..]).ok_or(Reason::NoRingMemory)?);
        }
        debug!(slab, program, pages = numbers.len(), runs = told.len(), how = memory.how(), "a slab");
        self.tell_agent(Message::SlabMade { slab, program, geometry }, vec![memory.fd()]);
        self.registration.keep(slab, memory);
        let mut first = 0;
        for (runs, taken) in told {
            self.tell_host(Message::SlabPages { slab, first, runs });
            first += taken as u32;
        }
        Ok(())
    }

    // ---- the agent -------------------------------------------------------------------------------------------------

    fn start_agent(&mut self) {
        match Agent::start(&self.options.host, self.now) {
            Ok(agent) => {
                debug!(pid = agent.pid(), "an agent");
                self.agent = Some(agent);
                if let Some(registered) = self.registration.current() {
                    self.tell_agent(registered, Parcel::new());
                }
            }
            Err(error) => {
                warn!(%error, "cannot start an agent");
                self.start_at = self.now + self.backoff.next(false);
            }
        }
    }

    fn tell_agent(&mut self, message: Message, parcel: Parcel) {
        let Some(agent) = &mut self.agent else { return };
        if let Err(error) = agent.post.send(message, parcel) {
            // It has died, which is heard of in a moment, or reads nothing and is of no use.
            debug!(%error, "cannot tell the agent");
            agent.signal(rustix::process::Signal::KILL);
        }
    }

    fn handle_agent_ended(&mut self) {
        let Some(agent) = &mut self.agent else { return };
        let Some(status) = agent.ended() else { return };
        let proven = agent.is_proven(self.now);
        self.agent = None;
        match child::in_order(status) {
            Some(code) => self.over = Some((code, self.now + ENDING)),
            None if self.stopping => self.over = Some((1, self.now + ENDING)),
            None => {
                let pause = self.backoff.next(proven);
                warn!(%status, ?pause, "the agent has died, and is started again");
                self.start_at = self.now + pause;
            }
        }
    }

    fn stop(&mut self) {
        self.stopping = true;
        match &self.agent {
            Some(agent) => agent.signal(rustix::process::Signal::TERM),
            None => self.over = Some((0, self.now + ENDING)),
        }
    }
}
