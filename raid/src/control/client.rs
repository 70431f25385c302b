//! The asking side: finding served volumes and talking to them.

use super::{SUFFIX, runtime_dir, socket_path};
use crate::error::{Error, Result};
use crate::status::Status;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;
use uuid::Uuid;

/// The longest answer that is taken.
const MAX_ANSWER: usize = 16 << 20;

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
        self.ask(Method::GET, "/status").await
    }

    /// Stops the volume: `Some` once it is flushed and marked clean. `None`: nobody serves it.
    pub async fn stop(&self) -> Result<Option<()>> {
        Ok(self.ask::<Value>(Method::POST, "/stop").await?.map(|_| ()))
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<Option<T>> {
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
        let request = request.body(Empty::<Bytes>::new()).map_err(|e| broken(&e))?;
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

/// Every volume that is served at the moment, as found in the [`runtime_dir`].
pub async fn served() -> Result<Vec<(Client, Status)>> {
    let dir = runtime_dir();
    let failed = |error: std::io::Error| Error::RuntimeDir {
        path: dir.display().to_string(),
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    };
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        // Nobody has served anything yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if !is_control_socket(&path) {
            continue;
        }
        let client = Client { socket: path };
        if let Some(status) = client.status().await? {
            found.push((client, status));
        }
    }
    found.sort_by_key(|(_, status)| status.uuid);
    Ok(found)
}

fn is_control_socket(path: &Path) -> bool {
    let uuid = path.file_stem().and_then(|stem| stem.to_str()).map(Uuid::parse_str);
    path.extension().is_some_and(|extension| extension == SUFFIX) && matches!(uuid, Some(Ok(_)))
}
