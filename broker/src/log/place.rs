//! Opening what was named, so that nobody serves it meanwhile. Members are locked shared: servers lock them exclusively,
//! so each keeps the other out, and several lookers do not mind each other.

use super::LogError;
use logstore::inspect::Inspection;
use raid::device::{Device, FileDevice, OpenMode};
use raid::runtime::TokioRuntime;
use raid::volume::{AssembleOptions, Volume};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A store that is open for looking.
pub(super) struct Opened {
    pub(super) inspection: Inspection,
    /// Held, not looked at.
    _locks: Vec<File>,
    _volume: Option<Arc<Volume>>,
}

/// Opens the store on a volume, or in a directory.
pub(super) async fn open(members: &[PathBuf], dir: Option<&Path>) -> Result<Opened, LogError> {
    if let Some(dir) = dir {
        let inspection = Inspection::directory(dir).await?;
        return Ok(Opened { inspection, _locks: Vec::new(), _volume: None });
    }
    let mut locks = Vec::new();
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for path in members {
        let name = path.display().to_string();
        let file = match File::open(path) {
            Ok(file) => file,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                eprintln!("broker: {name} does not exist: reading without it");
                continue;
            }
            Err(cause) => return Err(LogError::Open { path: name, cause }),
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => locks.push(file),
            Err(Errno::WOULDBLOCK) => return Err(LogError::InUse { path: name }),
            Err(errno) => return Err(LogError::Open { path: name, cause: errno.into() }),
        }
        devices.push(Arc::new(FileDevice::open(path, OpenMode::ReadOnly)?));
    }
    if devices.is_empty() {
        let first = members.first().map(|path| path.display().to_string()).unwrap_or_default();
        return Err(LogError::NoMember(first));
    }
    let options = AssembleOptions { read_only: true, hold_resync: true };
    let volume = Volume::assemble(devices, options, Arc::new(TokioRuntime::current())).await?;
    let inspection = Inspection::volume(Arc::clone(&volume) as Arc<dyn Device>).await?;
    Ok(Opened { inspection, _locks: locks, _volume: Some(volume) })
}
