//! `vsocketd capture`: reads a capture's queue and writes the file.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use pcap_file::{DataLink, PcapError, TsResolution};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send,
    sockopt::set_socket_timeout,
};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use vsocket_channel::Side;
use vsocket_channel::layout::Geometry;
use vsocket_channel::message::{MESSAGE_LEN, Message, Tuple};
use vsocket_channel::ring::Ring;

use super::{Builder, Filter, FlowFilter, MAX_QUEUE, MIN_QUEUE, RECORD_LEN, Record};
use crate::carrier::connect_to;
use crate::operator::{ToolError, find_vport, stat};
use crate::slab::{Memory, View};

/// Bytes of the file's header, and of each packet's.
const FILE_HEADER: u64 = 24;
const PACKET_HEADER: u64 = 16;
/// The longest packet that anyone asks for, as other capture tools have it.
const LONGEST: u32 = 262_144;

/// What to capture, and how much.
#[derive(Clone, Debug)]
pub struct Options {
    /// Of this vport only.
    pub vport: Option<String>,
    /// Of this tenant network only.
    pub vni: Option<u32>,
    /// Of these connections only.
    pub flow: FlowFilter,
    /// The file, or `-`.
    pub file: PathBuf,
    /// The file's length at most.
    pub bytes: u64,
    /// Bytes of each packet.
    pub snaplen: u32,
    /// Packets at most.
    pub count: u64,
    /// Bytes that may wait between daemon and tool.
    pub buffer: u64,
}

/// Why there is no capture, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Asking the daemon.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The socket, the queue or signals.
    #[error("cannot capture")]
    System(#[from] io::Error),
    /// The file.
    #[error("cannot write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No vport is in that network.
    #[error("no vport of this host is in VNI {0}")]
    NoVni(u32),
    /// An option.
    #[error("{0}")]
    Option(&'static str),
    /// The daemon has ended, or ended this tool's connection.
    #[error("the daemon has ended the capture")]
    Ended,
}

/// The daemon's end of the talk, and the queue.
struct Source {
    socket: OwnedFd,
    bell: OwnedFd,
    view: View,
    tail: u64,
}

/// A file that this module can flush while pcap-file writes to it.
#[derive(Clone)]
struct Shared(Rc<RefCell<BufWriter<File>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.borrow_mut().flush()
    }
}

/// The file so far.
struct Sink<'a> {
    options: &'a Options,
    pcap: PcapWriter<Shared>,
    file: Shared,
    builder: Builder,
    packets: u64,
    bytes: u64,
    /// The option that ended it.
    limit: Option<&'static str>,
}

/// Why no more packets are written.
enum Full {
    Limit(&'static str),
    Io(io::Error),
    Malformed,
}

impl From<vsocket_vxlan::Error> for Full {
    fn from(_: vsocket_vxlan::Error) -> Self {
        Self::Malformed
    }
}

/// Captures until something ends it, and tells on standard error what came of it.
///
/// # Errors
///
/// [`Error`].
pub fn run(control: &Path, options: &Options) -> Result<(), Error> {
    let totals = stat(control, false)?;
    let filter = filter(&totals, options)?;
    if options.snaplen == 0 || options.count == 0 || options.bytes < FILE_HEADER {
        return Err(Error::Option("--snaplen, --count and --bytes must leave room for a packet"));
    }
    if !(MIN_QUEUE..=MAX_QUEUE).contains(&options.buffer) {
        return Err(Error::Option("--buffer must be between 256K and 1G"));
    }
    let (stop, signals) = signals()?;
    let write = |source| Error::Write { path: options.file.clone(), source };
    let mut sink = Sink::open(options).map_err(write)?;
    let mut source =
        Source::ask(control, filter.request(options.snaplen, options.buffer.next_power_of_two()))?;
    eprintln!("vsocketd: capturing on {}{}", text(&totals["host"]), matching(control, &totals, &filter)?);
    let ended = turn(&mut source, &mut sink, &stop, &signals);
    let counters = match ended {
        Ok(()) => source.end(),
        Err(_) => None,
    };
    let ended = ended.and_then(|()| match sink.limit {
        Some(_) => Ok(()),
        None => source.read(&mut sink).map(|_| ()),
    });
    let flushed = sink.file.flush();
    sink.report(counters.as_ref());
    match ended.and(flushed.map_err(Full::Io)) {
        // Whoever read the pipe has seen enough.
        Err(Full::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(Full::Io(error)) => Err(write(error)),
        Err(Full::Malformed) => Err(Error::Ended),
        Err(Full::Limit(_)) | Ok(()) => Ok(()),
    }
}

/// SIGINT and SIGTERM: a flag, and a descriptor to wait for. The second one ends at once, also when the file blocks.
fn signals() -> io::Result<(Arc<AtomicBool>, UnixStream)> {
    let (reader, writer) = UnixStream::pair()?;
    let stop = Arc::<AtomicBool>::default();
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    Ok((stop, reader))
}

fn filter(totals: &Value, options: &Options) -> Result<Filter, Error> {
    let vport = options.vport.as_deref().map(|name| find_vport(totals, name)).transpose()?;
    let mut vports = totals["vports"].as_array().into_iter().flatten();
    match options.vni {
        Some(vni) if !vports.any(|v| v["vni"] == vni) => return Err(Error::NoVni(vni)),
        _ => {}
    }
    Ok(Filter { vport, vni: options.vni, flow: options.flow })
}

/// What there is to capture now, in words.
fn matching(control: &Path, totals: &Value, filter: &Filter) -> Result<String, Error> {
    let connections = stat(control, true)?;
    let vports = totals["vports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let matches = |line: &&Value| {
        let vport = vports.iter().find(|v| v["name"] == line["vport"]);
        let number = |key| vport.and_then(|v| v[key].as_u64()).unwrap_or_default() as u32;
        let [local, remote] = ["local", "remote"].map(|end| text(&line[end]).parse());
        let (Ok(local), Ok(remote)) = (local, remote) else { return false };
        filter.matches(number("number"), number("vni"), &Tuple::new(local, remote))
    };
    let lines: Vec<_> = connections.as_array().into_iter().flatten().filter(matches).collect();
    let on = |lane: &str| lines.iter().filter(|line| line["lane"] == lane).count();
    let (fabric, direct) = (on("fabric"), on("direct"));
    Ok(match (fabric, direct) {
        (0, 0) => "; no connection on lane fabric matches yet".to_owned(),
        (0, n) => format!(
            "; all that match ({n}) are on lane direct: they stay on this host, are not encapsulated, and cannot be \
             captured"
        ),
        (n, 0) => format!("; {n} connections on lane fabric match"),
        (n, m) => format!(
            "; {n} connections on lane fabric match, and {m} on lane direct, which are not encapsulated"
        ),
    })
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Reads and waits, until a limit, a signal or the daemon ends it.
fn turn(
    source: &mut Source,
    sink: &mut Sink<'_>,
    stop: &AtomicBool,
    signals: &UnixStream,
) -> Result<(), Full> {
    while !stop.load(Ordering::Relaxed) && sink.limit.is_none() {
        if source.read(sink)? {
            continue;
        }
        // Who reads a pipe sees all that there is.
        sink.file.flush().map_err(Full::Io)?;
        let bell = &source.view.slab().bells[0][0];
        bell.announce();
        if source.ring().available(source.tail).map_err(|_| Full::Malformed)? == 0 {
            let mut ready = [source.bell.as_fd(), source.socket.as_fd(), signals.as_fd()]
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut ready, None::<&Timespec>) {
                Err(error) if error != rustix::io::Errno::INTR => return Err(Full::Io(error.into())),
                _ => {}
            }
            // A word of the daemon that was not asked for is its end.
            if !ready[1].revents().is_empty() {
                source.read(sink)?;
                return Err(Full::Malformed);
            }
            let _ = rustix::io::read(&source.bell, &mut [0; 8]);
        }
        bell.awake(true);
    }
    Ok(())
}

impl Source {
    /// Asks for a capture.
    fn ask(control: &Path, request: Message) -> Result<Self, Error> {
        let failed = |source| ToolError::Ask { path: control.to_owned(), source };
        let no_answer = || ToolError::NoAnswer { path: control.to_owned() };
        let socket = connect_to(control).map_err(failed)?;
        send(&socket, &request.encode(), SendFlags::NOSIGNAL).map_err(|e| failed(e.into()))?;
        let (reply, mut files) = receive(&socket).map_err(failed)?;
        let queue = match (reply, files.len()) {
            (Some(Message::Captured { queue }), 2) => queue,
            (Some(Message::Reply { len, ok: false }), 1) => {
                let mut why = String::new();
                File::from(files.remove(0)).take(len).read_to_string(&mut why).map_err(failed)?;
                return Err(ToolError::Refused(why).into());
            }
            _ => return Err(no_answer().into()),
        };
        let (bell, memfd) = (files.remove(1), files.remove(0));
        let geometry = Geometry::new(1, queue).ok_or_else(no_answer)?;
        let memory = Memory::map(memfd, geometry)?;
        // Here and not in the daemon, which has better to do.
        if let Some(at) = geometry.ring_offset(0, Side::One) {
            memory.populate(at, geometry.ring_len())?;
        }
        let view = View::new(&Arc::new(memory), 0).ok_or_else(no_answer)?;
        Ok(Self { socket, bell, view, tail: 0 })
    }

    fn ring(&self) -> Ring<'_> {
        Ring { indices: &self.view.header().directions[1], bytes: &self.view.rings[1] }
    }

    /// Writes what is there now. Says whether there was anything.
    fn read(&mut self, sink: &mut Sink<'_>) -> Result<bool, Full> {
        let available = self.ring().available(self.tail).map_err(|_| Full::Malformed)? as u64;
        let end = self.tail.wrapping_add(available);
        let mut segment = Vec::new();
        while self.tail != end {
            let mut image = [0; RECORD_LEN];
            self.view.rings[1].get(self.tail, &mut image);
            let record = Record::decode(&image);
            if record.whole() as u64 > end.wrapping_sub(self.tail) {
                return Err(Full::Malformed);
            }
            segment.resize(record.header + record.kept, 0);
            self.view.rings[1].get(self.tail.wrapping_add(RECORD_LEN as u64), &mut segment);
            self.tail = self.tail.wrapping_add(record.whole() as u64);
            self.ring().release(self.tail);
            match sink.write(&record, &segment) {
                Err(Full::Limit(limit)) => {
                    sink.limit = Some(limit);
                    return Ok(true);
                }
                other => other?,
            }
        }
        Ok(available > 0)
    }

    /// Ends the capture: what the daemon has counted, if it still answers.
    fn end(&self) -> Option<Value> {
        let limit = Some(Duration::from_secs(2));
        set_socket_timeout(&self.socket, rustix::net::sockopt::Timeout::Recv, limit).ok()?;
        send(&self.socket, &Message::CaptureEnd {}.encode(), SendFlags::NOSIGNAL).ok()?;
        let (Some(Message::Reply { len, ok: true }), mut files) = receive(&self.socket).ok()? else {
            return None;
        };
        let mut text = String::new();
        File::from(files.pop()?).take(len).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// One message with its descriptors.
fn receive(socket: &OwnedFd) -> io::Result<(Option<Message>, Vec<OwnedFd>)> {
    let mut image = [0; MESSAGE_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut into = [io::IoSliceMut::new(&mut image)];
    let got = recvmsg(socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    Ok((image.get(..got).and_then(|image| Message::decode(image).ok()), fds))
}

impl<'a> Sink<'a> {
    fn open(options: &'a Options) -> io::Result<Self> {
        let file = if options.file == Path::new("-") {
            if io::stdout().is_terminal() {
                return Err(io::Error::other("it is a terminal; pipe it into a reader of pcap"));
            }
            File::from(io::stdout().as_fd().try_clone_to_owned()?)
        } else {
            File::create(&options.file)?
        };
        let file = Shared(Rc::new(RefCell::new(BufWriter::with_capacity(256 << 10, file))));
        let header = PcapHeader {
            snaplen: options.snaplen.min(LONGEST),
            datalink: DataLink::ETHERNET,
            ts_resolution: TsResolution::NanoSecond,
            ..PcapHeader::default()
        };
        let pcap = PcapWriter::with_header(file.clone(), header).map_err(plain)?;
        // A reader of the pipe may want to see what it is before the first packet.
        file.clone().flush()?;
        let builder = Builder::new(options.snaplen.min(LONGEST));
        Ok(Self { options, pcap, file, builder, packets: 0, bytes: FILE_HEADER, limit: None })
    }

    /// Writes the packets of one record.
    fn write(&mut self, record: &Record, segment: &[u8]) -> Result<(), Full> {
        let Self { options, pcap, builder, packets, bytes, .. } = self;
        builder.packets(record, segment, |packet, len| {
            if *bytes + PACKET_HEADER + packet.len() as u64 > options.bytes {
                return Err(Full::Limit("--bytes"));
            }
            let packet = PcapPacket::new(record.time, len as u32, packet);
            let written = pcap.write_packet(&packet).map_err(|error| Full::Io(plain(error)))?;
            *bytes += written as u64;
            *packets += 1;
            if *packets >= options.count { Err(Full::Limit("--count")) } else { Ok(()) }
        })
    }

    /// The end, for people.
    fn report(&self, counters: Option<&Value>) {
        let (packets, bytes, file) = (self.packets, self.bytes, self.options.file.display());
        let ended = self.limit.map_or(String::new(), |limit| format!("; {limit} reached"));
        eprintln!("vsocketd: {packets} packets, {bytes} bytes in {file}{ended}");
        let Some(counters) = counters else { return };
        let dropped = counters["dropped"].as_object().into_iter().flatten();
        let dropped: Vec<_> =
            dropped.filter(|(_, n)| **n != 0).map(|(name, n)| format!("{name} {n}")).collect();
        let dropped = if dropped.is_empty() { "none".to_owned() } else { dropped.join(", ") };
        eprintln!("vsocketd: {} segments matched; dropped: {dropped}", counters["segments"]);
    }
}

fn plain(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
