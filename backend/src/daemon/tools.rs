//! The operator's tools on the event loop.

#![forbid(unsafe_code)]

use mio::Interest;
use vsocket_channel::message::Message;

use super::{Daemon, Source};
use crate::operator::answer_file;

impl Daemon {
    pub(super) fn tool_arrives(&mut self) {
        while let Some((tool, fd)) = self.operator.accept() {
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
                Ok(Some(question)) => {
                    let (ok, text) = self.answer(question);
                    self.reply(tool, ok, &text);
                }
                Err(gone) => {
                    if let Some(name) = gone.name() {
                        self.metrics.drops.count(name);
                    }
                    self.operator.forget(tool);
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
        self.operator.forget(tool);
    }
}
