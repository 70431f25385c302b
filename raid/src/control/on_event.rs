//! Running a program on each event of a volume, as `mdadm --monitor --program` does.
//!
//! The program is run with the event's name, the volume's name and, where there is one, the member's path as
//! arguments, without a shell in between. On its stdin it finds one JSON document: the event's own fields, with
//! `volume` and `uuid`. Its stdout is not ours to mix with and goes nowhere; its stderr is the server's.
//!
//! Invariants: one runs at a time, in the order of events. Nothing ever waits for it: while it runs, events queue up in
//! the volume's bounded backlog, and what is lost when that overflows is logged. It has [`TIME_LIMIT`]; then it is
//! killed with all it has started in its process group. Each one is waited for: no zombies.

use crate::error::{Error, Result};
use crate::event::Event;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// How long one run may take.
pub const TIME_LIMIT: Duration = Duration::from_secs(60);
/// How long the server waits at its end for what is still to be run.
const CLOSING: Duration = Duration::from_secs(5);

/// A program that can be run.
#[derive(Debug, Clone)]
pub struct Program(PathBuf);

impl Program {
    /// Finds it: a path, or a name that is looked up in `$PATH`. Must be an executable file.
    pub fn find(program: &Path) -> Result<Self> {
        let refused = |errno| Error::NoProgram { program: program.display().to_string(), errno };
        if program.components().count() > 1 || program.is_absolute() {
            runnable(program).map_err(refused)?;
            let absolute = std::path::absolute(program);
            return absolute.map(Self).map_err(|e| refused(Errno::from_io_error(&e).unwrap_or(Errno::NOENT)));
        }
        let dirs = std::env::var_os("PATH").unwrap_or_default();
        let found =
            std::env::split_paths(&dirs).map(|dir| dir.join(program)).find(|path| runnable(path).is_ok());
        found.map(Self).ok_or_else(|| refused(Errno::NOENT))
    }
}

fn runnable(path: &Path) -> std::result::Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(Errno::ACCESS);
    }
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK)
}

/// A program that is run on events. Dropped, it ends at once, with whatever runs.
#[derive(Debug)]
pub struct OnEvent {
    close: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl OnEvent {
    /// Runs `program` on each of `events` of the volume. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(program: Program, volume: &str, uuid: Uuid, events: Receiver<Event>) -> Self {
        let (close, closing) = watch::channel(false);
        let runner = Runner { program, volume: volume.to_owned(), uuid, limit: TIME_LIMIT };
        Self { close, task: tokio::spawn(runner.run(events, closing)) }
    }

    /// Takes no more events; lets what has happened already be told, if that does not take long.
    pub async fn close(mut self) {
        self.close.send_replace(true);
        if tokio::time::timeout(CLOSING, &mut self.task).await.is_err() {
            tracing::warn!("the program for events takes too long: the last events are not told to it");
        }
    }
}

impl Drop for OnEvent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Runner {
    program: Program,
    volume: String,
    uuid: Uuid,
    /// How long one run may take.
    limit: Duration,
}

impl Runner {
    async fn run(self, mut events: Receiver<Event>, mut closing: watch::Receiver<bool>) {
        loop {
            let next = tokio::select! {
                biased;
                next = events.recv() => next,
                _ = closing.wait_for(|closing| *closing) => match events.try_recv() {
                    Ok(event) => Ok(event),
                    Err(TryRecvError::Lagged(n)) => Err(RecvError::Lagged(n)),
                    Err(TryRecvError::Empty | TryRecvError::Closed) => return,
                },
            };
            match next {
                Ok(event) => self.tell(&event).await,
                Err(RecvError::Lagged(lost)) => {
                    tracing::warn!(lost, "the program for events is too slow: events were not told to it");
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Runs the program on one event. What goes wrong is logged.
    async fn tell(&self, event: &Event) {
        let program = self.program.0.display().to_string();
        let mut command = Command::new(&self.program.0);
        command.arg(event.name()).arg(&self.volume).args(event.member());
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        // A group of its own: the terminal's ^C is the server's alone, and what the program starts ends with it.
        command.process_group(0).kill_on_drop(true);
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                tracing::warn!(
                    program,
                    event = event.name(),
                    "the program for events cannot be run: {error}"
                );
                return;
            }
        };
        let mut running = Running(child);
        match tokio::time::timeout(self.limit, running.feed(&self.document(event))).await {
            Ok(Ok(status)) if status.success() => {}
            Ok(Ok(status)) => {
                tracing::warn!(program, event = event.name(), "the program for events failed: {status}");
            }
            Ok(Err(error)) => {
                tracing::warn!(program, event = event.name(), "the program for events: {error}");
            }
            Err(_) => {
                tracing::warn!(
                    program,
                    event = event.name(),
                    "the program for events ran too long and is killed"
                );
                running.kill();
                if let Err(error) = running.0.wait().await {
                    tracing::warn!(program, "the program for events cannot be waited for: {error}");
                }
            }
        }
    }

    /// The event as the program reads it.
    fn document(&self, event: &Event) -> Vec<u8> {
        // Events have string keys and integers: they always serialise.
        let mut document = serde_json::to_value(event).unwrap_or_else(|_| json!({ "event": event.name() }));
        if let Value::Object(fields) = &mut document {
            fields.insert("volume".to_owned(), self.volume.clone().into());
            fields.insert("uuid".to_owned(), self.uuid.to_string().into());
        }
        let mut text = document.to_string().into_bytes();
        text.push(b'\n');
        text
    }
}

/// A child with its process group, killed when dropped while it runs.
struct Running(Child);

impl Running {
    /// Gives it its stdin and waits for its end.
    async fn feed(&mut self, document: &[u8]) -> std::io::Result<std::process::ExitStatus> {
        let stdin = self.0.stdin.take();
        let write = async {
            if let Some(mut stdin) = stdin {
                // A program that does not read it has its reasons.
                if let Err(error) = stdin.write_all(document).await {
                    tracing::debug!("the program for events does not read its stdin: {error}");
                }
            }
        };
        let ((), status) = tokio::join!(write, self.0.wait());
        status
    }

    fn kill(&self) {
        // No id: it has been waited for.
        let pid = self.0.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(errno) = kill_process_group(pid, Signal::KILL)
        {
            tracing::warn!("the program for events cannot be killed: {errno}");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventLog;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, body: &str) -> Program {
        let path = dir.join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Program::find(&path).unwrap()
    }

    #[tokio::test]
    async fn each_event_in_order_with_arguments_and_a_document() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let program = script(dir.path(), &format!("echo \"$# $*\" >>'{0}'; cat >>'{0}'", out.display()));
        let log = EventLog::new("vol");
        let running = OnEvent::start(program, "vol", Uuid::nil(), log.subscribe());
        log.emit(Event::MemberFailed { slot: Some(1), path: "/a b".to_owned(), cause: "no".to_owned() });
        log.emit(Event::Grown { size: 5 });
        running.close().await;
        let said = std::fs::read_to_string(out).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 4, "{said}");
        assert_eq!((lines[0], lines[2]), ("3 Fail vol /a b", "2 Grown vol"));
        let document: Value = serde_json::from_str(lines[1]).unwrap();
        assert_eq!(document["event"], "Fail");
        assert_eq!(
            (&document["slot"], &document["volume"], &document["cause"]),
            (&1.into(), &"vol".into(), &"no".into())
        );
    }

    #[tokio::test]
    async fn one_that_fails_or_reads_nothing_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let program = script(dir.path(), &format!("exec <&-; echo \"$1\" >>'{}'; exit 3", out.display()));
        let log = EventLog::new("vol");
        let running = OnEvent::start(program, "vol", Uuid::nil(), log.subscribe());
        log.emit(Event::Failed { cause: "x".repeat(1 << 20) });
        log.emit(Event::ResyncFinished);
        running.close().await;
        assert_eq!(std::fs::read_to_string(out).unwrap(), "FailedArray\nResyncFinished\n");
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_its_children_and_the_next_event_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        // The first event hangs in a child of its own.
        let hang = format!("sleep 1000 & echo $! >'{}'; wait", out.with_extension("pid").display());
        let body = format!("if [ \"$1\" = Grown ]; then {hang}; fi; echo \"$1\" >>'{}'", out.display());
        let program = script(dir.path(), &body);
        let limit = Duration::from_secs(3);
        let runner = Runner { program, volume: "vol".to_owned(), uuid: Uuid::nil(), limit };
        runner.tell(&Event::Grown { size: 1 }).await;
        runner.tell(&Event::ResyncFinished).await;
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "ResyncFinished\n");
        let pid = std::fs::read_to_string(out.with_extension("pid")).unwrap().trim().to_owned();
        // Killed; whoever inherits it may not have waited for it yet.
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z ") || state.contains(") X "), "{state}");
    }

    #[test]
    fn what_cannot_be_run_is_refused_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        for wrong in
            [&file, dir.path(), Path::new("no-such-program-anywhere"), Path::new("/no/such"), Path::new("")]
        {
            let refused = Program::find(wrong).unwrap_err();
            assert!(matches!(refused, Error::NoProgram { .. }), "{refused}");
        }
        assert!(Program::find(Path::new("sh")).is_ok());
    }
}
