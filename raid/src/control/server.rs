//! The listening side: the socket of a volume that this process serves, its beginning and its end. What can be asked on
//! it is in `requests`.

use super::members::Opener;
use super::{make_runtime_dir, requests, runtime_dir, socket_path};
use crate::attach::Attacher;
use crate::error::Result;
use crate::socket::UnixListener;
use crate::volume::Volume;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

/// How long clients have to take their last answers when the server closes.
const CLOSING: Duration = Duration::from_secs(2);
/// After a failed accept (no file descriptors, say), the next try waits so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a stop is asked for and how it went, between whoever asks (the control socket, a signal) and the process's main
/// flow, which does it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<watch::Sender<Stop>>);

#[derive(Debug, Clone)]
enum Stop {
    Running,
    Requested,
    /// `Err`: a sentence for the one who asked.
    Done(std::result::Result<(), String>),
}

impl StopHandle {
    /// Of a process that runs.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Stop::Running)))
    }

    /// Asks for the stop; asking again changes nothing.
    pub fn request(&self) {
        self.0.send_if_modified(|stop| {
            let first = matches!(stop, Stop::Running);
            if first {
                *stop = Stop::Requested;
            }
            first
        });
    }

    /// Completes when the stop has been asked for.
    pub async fn requested(&self) {
        // The sender lives as long as this handle.
        drop(self.0.subscribe().wait_for(|stop| !matches!(stop, Stop::Running)).await);
    }

    /// Tells everyone who waits for the stop how it went.
    pub fn report(&self, outcome: &Result<()>) {
        let told = outcome.as_ref().map(|&()| ()).map_err(ToString::to_string);
        self.0.send_replace(Stop::Done(told));
    }

    /// Completes when the stop is done, with what was reported.
    pub(super) async fn outcome(&self) -> std::result::Result<(), String> {
        let mut stop = self.0.subscribe();
        let done = stop.wait_for(|stop| matches!(stop, Stop::Done(_))).await;
        match done.as_deref() {
            Ok(Stop::Done(outcome)) => outcome.clone(),
            _ => Err("the process ended before the volume was stopped".to_owned()),
        }
    }
}

impl Default for StopHandle {
    fn default() -> Self {
        Self::new()
    }
}

/// A control socket at work. Dropped, it vanishes at once; [`ControlServer::close`] lets it finish its answers.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    close: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl ControlServer {
    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Takes no more connections, finishes the answers under way, and removes the socket.
    pub async fn close(mut self) {
        if let Some(close) = self.close.take() {
            // It has ended by itself if nobody receives this.
            if close.send(()).is_ok() && tokio::time::timeout(CLOSING, &mut self.task).await.is_err() {
                tracing::warn!("a control client did not take its answer");
            }
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a control socket needs besides the volume.
pub struct Handles {
    /// Is told when a client asks for the end.
    pub stop: StopHandle,
    /// Opens devices that are to become members.
    pub open: Opener,
    /// Shows the volume to its own machine; `None` where the process that serves it has it for itself.
    pub attach: Option<Arc<Attacher>>,
}

/// Listens on the volume's control socket in the [`runtime_dir`]. When a client asks for the end, the caller stops the
/// volume, [reports](StopHandle::report), and then closes this server.
pub async fn serve(volume: Arc<Volume>, handles: Handles) -> Result<ControlServer> {
    let dir = runtime_dir();
    make_runtime_dir(&dir)?;
    let path = socket_path(&dir, volume.uuid());
    let listener = Listener(UnixListener::bind(&path)?);
    let routes = requests::routes(volume, handles);
    let (close, closing) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let until = async move {
            // Closed or dropped: both are the end.
            drop(closing.await);
        };
        if let Err(error) = axum::serve(listener, routes).with_graceful_shutdown(until).await {
            tracing::error!("the control socket ended badly: {error}");
        }
    });
    Ok(ControlServer { path, close: Some(close), task })
}

struct Listener(UnixListener);

impl axum::serve::Listener for Listener {
    type Io = UnixStream;
    type Addr = ();

    async fn accept(&mut self) -> (UnixStream, ()) {
        loop {
            match std::future::poll_fn(|cx| self.0.poll_accept(cx)).await {
                Ok(stream) => return (stream, ()),
                Err(error) => {
                    tracing::warn!("cannot accept a control connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<()> {
        Ok(())
    }
}
