//! The asking side: finding served volumes and talking to them.

use super::requests::{Add, Done, Grown, Limit, OnMember, Replace, Scrub, ScrubReport};
use super::{SUFFIX, runtime_dir, socket_path};
use crate::attach::{Shown, Way};
use crate::error::{Error, Result};
use crate::event::Mismatch;
use crate::orders::{Added, MemberName, SpeedLimits};
use crate::status::Status;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use uuid::Uuid;

/// The longest answer that is taken.
const MAX_ANSWER: usize = 16 << 20;

/// How long a server has to say how its volume is when all are asked. It waits for no member to say so.
const PATIENCE: Duration = Duration::from_secs(3);

/// A control socket to ask. Each request is a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the volume of that identity, served or not.
    #[must_use]
    pub fn of(volume: Uuid) -> Self {
        Self { socket: socket_path(&runtime_dir(), volume) }
    }

    /// How the volume is. `None`: nobody serves it.
    pub async fn status(&self) -> Result<Option<Status>> {
        self.ask(Method::GET, "/status", &()).await
    }

    /// Stops the volume: `Some` once it is flushed and marked clean. `None`: nobody serves it.
    pub async fn stop(&self) -> Result<Option<()>> {
        self.order("/stop", &()).await
    }

    /// Declares a member failed.
    pub async fn fail(&self, member: MemberName) -> Result<Option<()>> {
        self.order("/fail", &OnMember { member }).await
    }

    /// Lets a failed member or a spare go.
    pub async fn remove(&self, member: MemberName) -> Result<Option<()>> {
        self.order("/remove", &OnMember { member }).await
    }

    /// Adds the device at an absolute path. With `force`, what it holds may be destroyed.
    pub async fn add(&self, path: PathBuf, force: bool) -> Result<Option<Added>> {
        self.ask(Method::POST, "/add", &Add { path, force }).await
    }

    /// Begins to copy a member to the device at an absolute path, which then takes its place.
    pub async fn replace(&self, member: MemberName, path: PathBuf) -> Result<Option<()>> {
        self.order("/replace", &Replace { member, path }).await
    }

    /// Begins to compare all copies; with `wait`, returns when that is done.
    pub async fn scrub(&self, repair: bool, wait: bool) -> Result<Option<ScrubReport>> {
        self.ask(Method::POST, "/scrub", &Scrub { repair, wait }).await
    }

    /// Ends a scrub that is under way.
    pub async fn cancel_scrub(&self) -> Result<Option<()>> {
        self.order("/scrub/cancel", &()).await
    }

    /// What the last scrub found.
    pub async fn mismatches(&self) -> Result<Option<Vec<Mismatch>>> {
        self.ask(Method::GET, "/mismatches", &()).await
    }

    /// Makes the array as large as its members allow; gives its size.
    pub async fn grow(&self) -> Result<Option<u64>> {
        Ok(self.ask(Method::POST, "/grow", &()).await?.map(|Grown { size }| size))
    }

    /// Sets speed limits; one that is `None` stays.
    pub async fn limit(&self, min: Option<u64>, max: Option<u64>) -> Result<Option<SpeedLimits>> {
        self.ask(Method::POST, "/limit", &Limit { min, max }).await
    }

    /// Where the volume is a file or a disk of its machine, if it is.
    pub async fn attached(&self) -> Result<Option<Option<Shown>>> {
        self.ask(Method::GET, "/attached", &()).await
    }

    /// Makes the volume a file or a disk of its machine.
    pub async fn attach(&self, way: Way) -> Result<Option<Shown>> {
        self.ask(Method::POST, "/attach", &way).await
    }

    /// Takes that away, flushed.
    pub async fn detach(&self) -> Result<Option<()>> {
        self.order("/detach", &()).await
    }

    /// A command that is answered by its being done.
    async fn order(&self, path: &str, order: &impl Serialize) -> Result<Option<()>> {
        Ok(self.ask::<Done>(Method::POST, path, order).await?.map(|Done {}| ()))
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Option<T>> {
        let stream = match UnixStream::connect(&self.socket).await {
            Ok(stream) => stream,
            Err(error) => {
                return match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
                    // No socket, or one whose server died.
                    Errno::NOENT | Errno::CONNREFUSED => Ok(None),
                    errno => Err(Error::ControlUnreachable { socket: self.name(), errno }),
                };
            }
        };
        let broken = |cause: &dyn std::fmt::Display| Error::ControlBroken {
            socket: self.name(),
            cause: cause.to_string(),
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        // What goes wrong on the connection is told to the request, too.
        let driver = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "raid10");
        let body = serde_json::to_vec(body).map_err(|e| broken(&e))?;
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| broken(&e))?;
        let answer = sender.send_request(request).await.map_err(|e| broken(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(|e| broken(&e))?;
        driver.abort();
        let body = body.to_bytes();
        if status.is_success() {
            return serde_json::from_slice(&body).map(Some).map_err(|e| broken(&e));
        }
        let said = serde_json::from_slice::<Value>(&body).ok();
        let said = said.as_ref().and_then(|body| body["error"].as_str());
        Err(said.map_or_else(|| broken(&status), |said| Error::Remote(said.to_owned())))
    }

    fn name(&self) -> String {
        self.socket.display().to_string()
    }
}

/// The volumes that are served at the moment.
#[derive(Debug, Default)]
pub struct Serving {
    /// Those that answered, by their ids.
    pub volumes: Vec<(Client, Status)>,
    /// Why nothing is known of others.
    pub unknown: Vec<Error>,
}

/// Asks every server that has a socket in the [`runtime_dir`], all at the same time: one that stands still, or may not be
/// asked, keeps no other from being found.
pub async fn served() -> Result<Serving> {
    let dir = runtime_dir();
    let failed = |error: std::io::Error| Error::RuntimeDir {
        path: dir.display().to_string(),
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    };
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        // Nobody has served anything yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Serving::default()),
        Err(error) => return Err(failed(error)),
    };
    let mut asked = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if is_control_socket(&path) {
            let client = Client { socket: path };
            asked.push(async move {
                let answer = tokio::time::timeout(PATIENCE, client.status()).await;
                let silent = Error::ControlSilent { socket: client.name(), seconds: PATIENCE.as_secs() };
                (client, answer.unwrap_or(Err(silent)))
            });
        }
    }
    let mut serving = Serving::default();
    for (client, answer) in join_all(asked).await {
        match answer {
            Ok(Some(status)) => serving.volumes.push((client, status)),
            Ok(None) => {}
            Err(error) => serving.unknown.push(error),
        }
    }
    serving.volumes.sort_by_key(|(_, status)| status.uuid);
    Ok(serving)
}

fn is_control_socket(path: &Path) -> bool {
    let uuid = path.file_stem().and_then(|stem| stem.to_str()).map(Uuid::parse_str);
    path.extension().is_some_and(|extension| extension == SUFFIX) && matches!(uuid, Some(Ok(_)))
}
