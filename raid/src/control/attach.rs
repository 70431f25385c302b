//! Showing a served volume to its own machine as a file or a disk, and taking that away.

use super::requests::{Answer, Body, Done, Served, read};
use crate::attach::{AttachError, Attacher, Shown, Way};
use crate::device::Device;
use crate::error::{Error, Result};
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

impl Served {
    fn attacher(&self) -> Result<Arc<Attacher>> {
        let own_use = || AttachError::OwnUse { name: self.volume.name().to_owned() };
        Ok(Arc::clone(self.attach.as_ref().ok_or_else(own_use)?))
    }

    /// Does with the attacher what may block, for as long as the kernel likes: nobody waits for it but who asked.
    async fn with_attacher<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Attacher) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let attacher = self.attacher()?;
        let name = self.volume.name().to_owned();
        let working = tokio::task::spawn_blocking(move || work(&attacher));
        working.await.unwrap_or(Err(Error::Stopped { name }))
    }
}

pub(super) async fn attached(State(served): State<Served>) -> Json<Option<Shown>> {
    Json(served.attach.as_ref().and_then(|attacher| attacher.shown()))
}

pub(super) async fn attach(State(served): State<Served>, body: Body) -> Answer<Shown> {
    let way: Way = read(&body)?;
    let io = tokio::runtime::Handle::current();
    served
        .to_its_end(move |served| async move {
            let (device, uuid) = (Arc::clone(&served.volume) as Arc<dyn Device>, served.volume.uuid());
            served.with_attacher(move |attacher| attacher.attach(device, uuid, way, &io)).await
        })
        .await
}

pub(super) async fn detach(State(served): State<Served>) -> Answer<Done> {
    served
        .to_its_end(|served| async move {
            // A volume that can no longer be flushed can be detached all the same, and says so.
            let shown = served.attacher()?.shown();
            let flushed = if shown.is_some() { served.volume.flush().await } else { Ok(()) };
            let name = served.volume.name().to_owned();
            served.with_attacher(move |attacher| attacher.detach(&name)).await?;
            let name = served.volume.name().to_owned();
            flushed.map_err(|error| AttachError::Unflushed { name, cause: error.to_string() })?;
            Ok(Done {})
        })
        .await
}
