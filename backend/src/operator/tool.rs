//! The other end of the operator's socket: what `vsocketd stat` and `vsocketd drain` do.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use serde_json::Value;
use vsocket_channel::message::{MESSAGE_LEN, Message};

use crate::carrier::connect_to;

/// Why a tool got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// There is no daemon, or it does not talk to us.
    #[error("cannot ask the daemon at {}", path.display())]
    Ask {
        /// Its control socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What came is no answer.
    #[error("the daemon at {} did not answer as a vsocketd does", path.display())]
    NoAnswer {
        /// Its control socket.
        path: PathBuf,
    },
    /// The daemon's own refusal.
    #[error("{0}")]
    Refused(String),
    /// There is no such vport.
    #[error("there is no vport {name}; there are: {known}")]
    NoVport {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

/// Asks a daemon.
///
/// # Errors
///
/// [`ToolError`].
pub fn ask(control: &Path, question: Message) -> Result<String, ToolError> {
    let path = || control.to_owned();
    let failed = |source| ToolError::Ask { path: path(), source };
    let (reply, file) = exchange(control, question).map_err(failed)?;
    let (Some(Message::Reply { len, ok }), Some(file)) = (reply, file) else {
        return Err(ToolError::NoAnswer { path: path() });
    };
    let mut text = String::new();
    File::from(file).take(len).read_to_string(&mut text).map_err(failed)?;
    if ok { Ok(text) } else { Err(ToolError::Refused(text)) }
}

fn exchange(control: &Path, question: Message) -> io::Result<(Option<Message>, Option<OwnedFd>)> {
    let socket = connect_to(control)?;
    send(&socket, &question.encode(), SendFlags::NOSIGNAL)?;
    let mut image = [0; MESSAGE_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut image)];
    let got = recvmsg(&socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let file = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((image.get(..got).and_then(|image| Message::decode(image).ok()), file))
}

/// The daemon's totals, or its connections.
///
/// # Errors
///
/// [`ToolError`].
pub fn stat(control: &Path, connections: bool) -> Result<Value, ToolError> {
    let text = ask(control, Message::Query { what: u32::from(connections) })?;
    serde_json::from_str(&text).map_err(|_| ToolError::NoAnswer { path: control.to_owned() })
}

/// The number of the vport of this name in the daemon's totals.
///
/// # Errors
///
/// [`ToolError::NoVport`].
pub fn find_vport(totals: &Value, name: &str) -> Result<u32, ToolError> {
    let vports = totals["vports"].as_array().map(Vec::as_slice).unwrap_or_default();
    let number = vports.iter().find(|v| v["name"] == name).and_then(|v| v["number"].as_u64());
    number.and_then(|n| u32::try_from(n).ok()).ok_or_else(|| {
        let known: Vec<_> = vports.iter().filter_map(|v| v["name"].as_str()).collect();
        ToolError::NoVport { name: name.to_owned(), known: known.join(", ") }
    })
}

/// Drains a vport by its name, or ends its drain.
///
/// # Errors
///
/// [`ToolError`].
pub fn drain(control: &Path, name: &str, on: bool) -> Result<(), ToolError> {
    let vport = find_vport(&stat(control, false)?, name)?;
    ask(control, Message::Drain { vport, on }).map(|_| ())
}

/// An answer for people: a list as a table, an object as lines.
pub fn as_text(answer: &Value) -> String {
    let mut out = String::new();
    match answer {
        Value::Array(rows) => table(rows, &mut out),
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::Array(rows) if rows.is_empty() => {}
                    Value::Array(rows) => {
                        let _ = writeln!(out, "\n{name}:");
                        table(rows, &mut out);
                    }
                    Value::Object(counters) if counters.is_empty() => {}
                    Value::Object(counters) => {
                        let each: Vec<_> =
                            counters.iter().map(|(k, v)| format!("{k} {}", plain(v))).collect();
                        let _ = writeln!(out, "{name}: {}", each.join(", "));
                    }
                    value => {
                        let _ = writeln!(out, "{name}: {}", plain(value));
                    }
                }
            }
        }
        value => out = plain(value),
    }
    out.trim_end().to_owned()
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        Value::Bool(yes) => (if *yes { "yes" } else { "no" }).to_owned(),
        value => value.to_string(),
    }
}

fn table(rows: &[Value], out: &mut String) {
    let Some(Value::Object(first)) = rows.first() else { return };
    let names: Vec<&String> = first.keys().collect();
    let mut lines: Vec<Vec<String>> = vec![names.iter().map(|name| (*name).clone()).collect()];
    lines.extend(rows.iter().map(|row| names.iter().map(|name| plain(&row[name.as_str()])).collect()));
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = lines.iter().map(|l| l[column].len()).max().unwrap_or(0);
            let _ = write!(out, "  {cell:<width$}");
        }
        while out.ends_with(' ') {
            out.pop();
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_for_people() {
        let answer = json!({
            "host": "h1",
            "declines": { "quota": 2 },
            "drops": {},
            "vports": [{ "agent": true, "name": "a" }, { "agent": false, "name": "long" }],
        });
        let text = as_text(&answer);
        assert!(text.contains("host: h1\n") && text.contains("declines: quota 2\n"), "{text}");
        assert!(text.contains("  agent  name\n  yes    a\n  no     long"), "{text}");
        assert!(!text.contains("drops"));
    }

    #[test]
    fn without_a_daemon_the_error_names_the_socket() {
        let error = stat(Path::new("/nonexistent/control"), false).unwrap_err();
        assert_eq!(error.to_string(), "cannot ask the daemon at /nonexistent/control");
    }
}
