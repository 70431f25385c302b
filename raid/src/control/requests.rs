//! The requests to a served volume: read, checked, carried out one at a time, answered.

use super::attach::{attach, attached, detach};
use super::members::{Opener, refuse_member, resolve};
use super::server::{Handles, StopHandle};
use crate::attach::Attacher;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::event::{Event, Mismatch};
use crate::orders::{Added, MemberName, SpeedLimits};
use crate::status::Status;
use crate::volume::Volume;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

/// A command on one member.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct OnMember {
    pub(super) member: MemberName,
}

/// A device to be added.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Add {
    pub(super) path: PathBuf,
    pub(super) force: bool,
}

/// A member to be replaced, and by what.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Replace {
    pub(super) member: MemberName,
    pub(super) path: PathBuf,
}

/// A scrub.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Scrub {
    pub(super) repair: bool,
    pub(super) wait: bool,
}

/// Speed limits; one that is left out stays.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Limit {
    pub(super) min: Option<u64>,
    pub(super) max: Option<u64>,
}

/// What the array holds after it has grown.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Grown {
    pub(super) size: u64,
}

/// What a scrub found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Whether differences were to be made good.
    pub repair: bool,
    /// Whether it came to its end; `false` if it was not waited for.
    pub finished: bool,
    /// Differences found in all.
    pub found: u64,
    /// Where; the volume remembers so many only, the first ones.
    pub mismatches: Vec<Mismatch>,
}

/// What the requests work on.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) volume: Arc<Volume>,
    stop: StopHandle,
    open: Opener,
    pub(super) attach: Option<Arc<Attacher>>,
    /// Held while a command changes the volume.
    one: Arc<tokio::sync::Mutex<()>>,
}

/// A failure, on its way to the client.
pub(super) struct Refused(Error);

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match self.0.errno() {
            Errno::IO => StatusCode::INTERNAL_SERVER_ERROR,
            Errno::NOENT => StatusCode::NOT_FOUND,
            _ => StatusCode::CONFLICT,
        };
        (status, Json(json!({ "error": self.0.to_string() }))).into_response()
    }
}

pub(super) type Answer<T> = std::result::Result<Json<T>, Refused>;

/// An object without fields.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Done {}

pub(super) fn routes(volume: Arc<Volume>, handles: Handles) -> Router {
    let Handles { stop, open, attach: attacher } = handles;
    let served = Served { volume, stop, open, attach: attacher, one: Arc::default() };
    Router::new()
        .route("/status", get(status))
        .route("/stop", post(stop_volume))
        .route("/fail", post(fail))
        .route("/remove", post(remove))
        .route("/add", post(add))
        .route("/replace", post(replace))
        .route("/scrub", post(scrub))
        .route("/scrub/cancel", post(cancel_scrub))
        .route("/mismatches", get(mismatches))
        .route("/grow", post(grow))
        .route("/limit", post(limit))
        .route("/attached", get(attached))
        .route("/attach", post(attach))
        .route("/detach", post(detach))
        .with_state(served)
}

impl Served {
    /// Carries a command that changes the volume out when all before it are done, to its end, whatever becomes of the
    /// client.
    pub(super) async fn carry_out<T: Serialize + Send + 'static, F>(
        &self,
        command: impl FnOnce(Self) -> F + Send + 'static,
    ) -> Answer<T>
    where
        F: Future<Output = Result<T>> + Send,
    {
        let one = Arc::clone(&self.one);
        self.to_its_end(|served| async move {
            let _alone = one.lock().await;
            command(served).await
        })
        .await
    }

    /// Carries a command out to its end, whatever becomes of the client.
    pub(super) async fn to_its_end<T: Serialize + Send + 'static, F>(
        &self,
        command: impl FnOnce(Self) -> F + Send + 'static,
    ) -> Answer<T>
    where
        F: Future<Output = Result<T>> + Send,
    {
        let served = self.clone();
        let running = tokio::spawn(async move { command(served).await });
        let name = self.volume.name().to_owned();
        // A task without an outcome: the process is about to end.
        let outcome = running.await.unwrap_or_else(|_| Err(Error::Stopped { name }));
        Ok(Json(outcome?))
    }

    /// Opens what is to become a member. Before its turn comes, as all that looks at paths: one that hangs holds up nobody
    /// else.
    async fn open(&self, path: PathBuf) -> Result<Arc<dyn Device>> {
        let (open, status, held) = (Arc::clone(&self.open), self.volume.status(), self.volume.held());
        let opening = tokio::task::spawn_blocking(move || {
            refuse_member(&status, &held, &path)?;
            open(&path)
        });
        let name = self.volume.name().to_owned();
        opening.await.unwrap_or_else(|_| Err(Error::Stopped { name }))
    }

    /// The member that is meant.
    async fn member(&self, named: MemberName) -> Result<MemberName> {
        let (status, held) = (self.volume.status(), self.volume.held());
        let resolving = tokio::task::spawn_blocking(move || resolve(&status, &held, &named));
        let name = self.volume.name().to_owned();
        resolving.await.unwrap_or(Err(Error::Stopped { name }))
    }
}

pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| Error::BadRequest(error.to_string()))
}

pub(super) type Body = axum::body::Bytes;

async fn status(State(served): State<Served>) -> Json<Status> {
    Json(served.volume.status())
}

async fn stop_volume(State(served): State<Served>) -> Answer<Done> {
    if let Some(attacher) = &served.attach {
        attacher.close(served.volume.name())?;
    }
    served.stop.request();
    served.stop.outcome().await.map_err(Error::Remote)?;
    Ok(Json(Done {}))
}

async fn fail(State(served): State<Served>, body: Body) -> Answer<Done> {
    let OnMember { member } = read(&body)?;
    let member = served.member(member).await?;
    served.carry_out(|served| async move { served.volume.fail(&member).await.map(|()| Done {}) }).await
}

async fn remove(State(served): State<Served>, body: Body) -> Answer<Done> {
    let OnMember { member } = read(&body)?;
    let member = served.member(member).await?;
    served.carry_out(|served| async move { served.volume.remove(&member).await.map(|()| Done {}) }).await
}

async fn add(State(served): State<Served>, body: Body) -> Answer<Added> {
    let Add { path, force } = read(&body)?;
    let device = served.open(path).await?;
    served.carry_out(move |served| async move { served.volume.add(device, force).await }).await
}

async fn replace(State(served): State<Served>, body: Body) -> Answer<Done> {
    let Replace { member, path } = read(&body)?;
    let member = served.member(member).await?;
    let device = served.open(path).await?;
    served
        .carry_out(
            move |served| async move { served.volume.replace(&member, device).await.map(|()| Done {}) },
        )
        .await
}

async fn scrub(State(served): State<Served>, body: Body) -> Answer<ScrubReport> {
    let Scrub { repair, wait } = read(&body)?;
    // From before it starts, so that its end is not missed.
    let events = served.volume.events();
    let started = move |served: Served| async move {
        served.volume.scrub(repair).await?;
        Ok(ScrubReport { repair, finished: false, found: 0, mismatches: Vec::new() })
    };
    let mut report = served.carry_out(started).await?;
    if wait {
        report.found = served.scrubbed(events).await?;
        report.finished = true;
        report.mismatches = served.volume.mismatches();
    }
    Ok(report)
}

impl Served {
    /// Waits for the end of a scrub; gives the number of differences.
    async fn scrubbed(&self, mut events: Receiver<Event>) -> Result<u64> {
        let stopped = |cause: String| Error::ScrubStopped { name: self.volume.name().to_owned(), cause };
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = self.stop.requested() => return Err(stopped("the volume is being stopped".to_owned())),
            };
            match event {
                Ok(Event::ScrubFinished { mismatches, .. }) => return Ok(mismatches),
                Ok(Event::ScrubStopped { cause }) => return Err(stopped(cause)),
                // What was lost is older than what is still to come: the end is not among it.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(stopped("the volume is gone".to_owned())),
            }
        }
    }
}

async fn cancel_scrub(State(served): State<Served>) -> Answer<Done> {
    served.volume.cancel_scrub().await?;
    Ok(Json(Done {}))
}

async fn mismatches(State(served): State<Served>) -> Json<Vec<Mismatch>> {
    Json(served.volume.mismatches())
}

async fn grow(State(served): State<Served>) -> Answer<Grown> {
    served.carry_out(|served| async move { served.volume.grow().await.map(|size| Grown { size }) }).await
}

async fn limit(State(served): State<Served>, body: Body) -> Answer<SpeedLimits> {
    let Limit { min, max } = read(&body)?;
    served
        .carry_out(move |served| async move {
            let now = served.volume.speed();
            let limits = SpeedLimits::new(min.unwrap_or(now.min), max.unwrap_or(now.max))?;
            served.volume.set_speed(limits);
            Ok(limits)
        })
        .await
}
