//! Who makes calls on a side: its main thread, a second one, and children. One at a time, told by the main thread.

use crate::calls::Scene;
use crate::end::TABLE;
use crate::plan::{ACTORS, CHILD, Call, MAIN, Step, THREAD};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// What an actor is told.
#[derive(Clone, Copy)]
pub enum Order {
    /// A step of the plan.
    Step(usize),
    /// To send so many bytes to who waits for them, or to shut.
    Answer(usize),
    /// To send what waits for more.
    Flush,
    /// To wait until all is here that has to come.
    Settle,
}

/// The way to an actor.
struct Line {
    out: UnixStream,
    back: BufReader<UnixStream>,
    thread: Option<std::thread::JoinHandle<()>>,
    child: libc::pid_t,
}

/// A side's actors.
pub struct Actors {
    scene: Arc<Scene>,
    steps: Arc<Vec<Step>>,
    lines: [Option<Line>; ACTORS],
}

/// Does what is ordered, in the actor.
fn obey(scene: &Scene, steps: &[Step], actor: usize, order: Order) -> String {
    let any = || TABLE.lock().expect("nobody panics with it").any();
    match order {
        Order::Step(i) => scene.act(actor, steps[i].call),
        Order::Answer(0) => scene.answer(any(), Call::Shutdown { slot: 0, how: libc::SHUT_WR }),
        Order::Answer(n) => scene.answer(any(), Call::Send { how: 0, slot: 0, n, flags: 0 }),
        Order::Flush => {
            any().inspect(|fd| scene.flush(*fd));
            String::new()
        }
        Order::Settle => any().map(|fd| scene.settle(fd)).unwrap_or_default(),
    }
}

/// The other end of a line: obeys until it ends.
fn serve(scene: &Scene, steps: &[Step], actor: usize, line: UnixStream) {
    let Ok(mut back) = line.try_clone() else { return };
    for order in BufReader::new(line).lines().map_while(Result::ok) {
        let order = match order.as_str() {
            "flush" => Order::Flush,
            "settle" => Order::Settle,
            number => match number.strip_prefix("answer ") {
                Some(n) => Order::Answer(n.parse().expect("a number")),
                None => Order::Step(number.parse().expect("a number")),
            },
        };
        let answer = obey(scene, steps, actor, order);
        if writeln!(back, "{answer}").is_err() {
            return;
        }
    }
}

impl Line {
    fn ask(&mut self, order: Order) -> String {
        let text = match order {
            Order::Step(i) => i.to_string(),
            Order::Answer(n) => format!("answer {n}"),
            Order::Flush => "flush".into(),
            Order::Settle => "settle".into(),
        };
        let mut answer = String::new();
        let asked = self.out.write_all(format!("{text}\n").as_bytes());
        match asked.and_then(|()| self.back.read_line(&mut answer)) {
            Ok(1..) => answer.trim_end().to_owned(),
            _ => "the actor has gone".into(),
        }
    }
}

impl Actors {
    /// The main thread alone.
    pub fn new(scene: Scene, steps: Arc<Vec<Step>>) -> Self {
        Self { scene: Arc::new(scene), steps, lines: [const { None }; ACTORS] }
    }

    /// Has one obey.
    pub fn order(&mut self, actor: usize, order: Order) -> String {
        if actor == MAIN {
            return obey(&self.scene, &self.steps, MAIN, order);
        }
        match &mut self.lines[actor] {
            Some(line) => line.ask(order),
            None => "nobody".into(),
        }
    }

    /// One that holds a descriptor of the connection.
    pub fn holder(&self) -> Option<usize> {
        (0..ACTORS).find(|actor| self.scene.end.held[*actor].is())
    }

    /// A step that is the main thread's own.
    pub fn turn(&mut self, call: Call) -> String {
        match call {
            Call::Spawn { actor } if self.lines[actor].is_none() => self.spawn(actor),
            Call::End { actor, killed } if self.lines[actor].is_some() => self.end(actor, killed),
            _ => "nothing".into(),
        }
    }

    fn spawn(&mut self, actor: usize) -> String {
        let Ok((out, theirs)) = UnixStream::pair() else { return "no sockets".into() };
        let Ok(clone) = out.try_clone() else { return "no sockets".into() };
        let back = BufReader::new(clone);
        let (scene, steps) = (self.scene.clone(), self.steps.clone());
        let (mut thread, mut child) = (None, 0);
        if actor == THREAD {
            thread = Some(std::thread::spawn(move || serve(&scene, &steps, actor, theirs)));
        } else {
            let held = TABLE.lock().expect("nobody panics with it").held();
            // SAFETY: the child only makes calls, and ends.
            child = unsafe { libc::fork() };
            if child == 0 {
                drop((out, back));
                // SAFETY: numbers. It must not outlive who tells it.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                serve(&scene, &steps, actor, theirs);
                // SAFETY: ends the child.
                unsafe { libc::_exit(0) }
            }
            if child < 0 {
                return "no child".into();
            }
            self.scene.end.held[actor].set(held);
        }
        self.lines[actor] = Some(Line { out, back, thread, child });
        "1".into()
    }

    fn end(&mut self, actor: usize, killed: bool) -> String {
        let end = self.scene.end;
        let held = end.held[actor].get();
        if actor >= CHILD && !end.may_close(held, false) {
            return "not now".into();
        }
        if let Some(line) = self.lines[actor].take() {
            if killed && line.child > 0 {
                // SAFETY: a child of ours that was not waited for yet.
                unsafe { libc::kill(line.child, libc::SIGKILL) };
            }
            line.over();
        }
        if actor >= CHILD {
            end.went(actor, held);
        }
        "0".into()
    }

    /// Ends all that is left, and every descriptor.
    pub fn over(mut self) {
        self.lines.iter_mut().filter_map(Option::take).for_each(Line::over);
        let mut table = TABLE.lock().expect("nobody panics with it");
        let set = std::mem::replace(&mut table.set, -1);
        let slots = std::mem::replace(&mut table.slots, [-1; crate::plan::SLOTS]);
        slots.into_iter().chain([set]).filter(|fd| *fd >= 0).for_each(|fd| {
            crate::sys::close(fd);
        });
        self.scene.end.clear();
    }
}

impl Line {
    fn over(self) {
        let Self { out, back, thread, child } = self;
        // Younger children hold it open too.
        let _ = out.shutdown(std::net::Shutdown::Both);
        drop((out, back));
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        if child > 0 {
            // SAFETY: a child of ours that was not waited for yet; no status is stored.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
    }
}
