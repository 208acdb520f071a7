//! The operator's tools on the event loop.

#![forbid(unsafe_code)]

use mio::Interest;
use vsocket_channel::message::Message;

use super::{Daemon, Source};
use crate::capture::{CAPTURES, Filter, Tap, vteps};
use crate::operator::answer_file;

impl Daemon {
    pub(super) fn tool_arrives(&mut self) {
        while let Some((tool, fd)) = self.operator.accept() {
            // The place may have been another's.
            self.end_capture(tool);
            if self.watch(fd, Source::Tool(tool), Interest::READABLE | Interest::WRITABLE).is_err() {
                self.operator.forget(tool);
            }
        }
    }

    pub(super) fn tool_ready(&mut self, tool: u32) {
        loop {
            let Some(carrier) = self.operator.tool(tool) else { return };
            match carrier.flush().and_then(|()| carrier.receive()) {
                Ok(None) => return,
                Ok(Some(Message::Capture { vport, vni, local, remote, snaplen, queue })) => {
                    self.capture(tool, Filter::of(vport, vni, local, remote), snaplen, queue);
                }
                Ok(Some(Message::CaptureEnd {})) => {
                    let counters = self.end_capture(tool);
                    let nothing = || (false, "this tool captures nothing".to_owned());
                    let (ok, text) = counters.map_or_else(nothing, |text| (true, text));
                    self.reply(tool, ok, &text);
                }
                Ok(Some(question)) => {
                    let (ok, text) = self.answer(question);
                    self.reply(tool, ok, &text);
                }
                Err(gone) => {
                    if let Some(name) = gone.name() {
                        self.metrics.drops.count(name);
                    }
                    self.forget_tool(tool);
                }
            }
        }
    }

    fn reply(&mut self, tool: u32, ok: bool, text: &str) {
        let sent = answer_file(text).map(|(file, len)| (file, Message::Reply { len, ok }));
        let Some(carrier) = self.operator.tool(tool) else { return };
        if sent.is_ok_and(|(file, reply)| carrier.send(&reply, vec![file]).is_ok()) {
            return;
        }
        self.forget_tool(tool);
    }

    fn forget_tool(&mut self, tool: u32) {
        self.end_capture(tool);
        self.operator.forget(tool);
    }

    fn capture(&mut self, tool: u32, filter: Filter, snaplen: u32, queue: u64) {
        self.end_capture(tool);
        let ends = vteps(self.overlay.own, &self.overlay.peers);
        let Some(data) = &mut self.data else {
            return self.reply(tool, false, "this host has no fabric: nothing is encapsulated");
        };
        let tap = match Tap::new(tool, filter, snaplen, queue, ends) {
            Ok(tap) => tap,
            Err(error) => return self.reply(tool, false, &format!("no queue of {queue} bytes: {error}")),
        };
        let fds = tap.descriptors();
        if !data.tap(tap) {
            let text = format!("{CAPTURES} captures run already: end one of them first");
            return self.reply(tool, false, &text);
        }
        let Some(carrier) = self.operator.tool(tool) else { return };
        if carrier.send(&Message::Captured { queue }, fds).is_err() {
            self.forget_tool(tool);
        }
    }

    /// Ends a tool's capture, if it has one: its counters.
    fn end_capture(&mut self, tool: u32) -> Option<String> {
        Some(self.data.as_mut()?.untap(tool)?.counters().to_string())
    }
}
