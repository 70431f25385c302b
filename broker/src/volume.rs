//! Opening the volume a broker runs on; making it, where none of it exists yet.
//!
//! Rule: where any member of an array is there, nothing is made. A set that is there in part starts degraded if it
//! safely can, and says what is missing; a start never puts a new image in the place of a lost one:
//! `raid10 add` does, when a person says so.

use logstore::Store;
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, FileDevice, OpenMode};
use raid::examine::examine;
use raid::geometry::Layout;
use raid::runtime::Runtime;
use raid::volume::{AssembleOptions, Volume};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The chunk of an array that is made here.
const CHUNK: u64 = 512 * 1024;

/// Why there is no volume.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing is there and nothing was to be made.
    #[error(
        "{first} does not exist, nor does any other member; name existing ones, or give --create-size 4G to make them"
    )]
    NothingThere {
        /// The first path named.
        first: String,
    },
    /// The directory of an image to be made is missing.
    #[error(
        "cannot make {path}: the directory {directory} does not exist; make it, or start in another directory"
    )]
    NoDirectory {
        /// The image.
        path: String,
        /// What is missing.
        directory: String,
    },
    /// The array could not be made.
    #[error("cannot make an array: {0}")]
    Create(raid::Error),
    /// The array could not be opened.
    #[error("cannot open the volume: {0}")]
    Open(raid::Error),
}

/// A volume that is open, and what a person should know about how that went.
pub struct Opened {
    /// The volume.
    pub volume: Arc<Volume>,
    /// Paths that were named and do not exist.
    pub missing: Vec<PathBuf>,
    /// It was made just now.
    pub created: bool,
}

/// Opens the array whose members are at `paths`, or makes it if no member exists and `create_size` says how large.
pub async fn open(
    paths: &[PathBuf],
    create_size: Option<u64>,
    runtime: Arc<dyn Runtime>,
) -> Result<Opened, OpenError> {
    let (there, missing): (Vec<PathBuf>, Vec<PathBuf>) = paths.iter().cloned().partition(|p| p.exists());
    let mut members = open_all(&there).map_err(OpenError::Open)?;
    let mut created = false;
    match create_size {
        Some(size) if !any_is_member(&members).await => {
            for path in &missing {
                make(path, size)?;
            }
            drop(members);
            // In the order given: it is the order of slots.
            members = open_all(paths).map_err(OpenError::Open)?;
            let options = CreateOptions {
                name: "decalog".to_owned(),
                layout: Layout::near(2),
                chunk: CHUNK,
                bitmap: Bitmap::STANDARD,
                assume_clean: false,
                force: false,
            };
            create(&members, &options, runtime.as_ref()).await.map_err(OpenError::Create)?;
            created = true;
        }
        None if there.is_empty() => {
            let first = paths.first().map(|p| p.display().to_string()).unwrap_or_default();
            return Err(OpenError::NothingThere { first });
        }
        _ => {}
    }
    let volume = Volume::assemble(members, AssembleOptions { read_only: false, hold_resync: true }, runtime);
    let volume = volume.await.map_err(OpenError::Open)?;
    Ok(Opened { volume, missing: if created { Vec::new() } else { missing }, created })
}

fn open_all(paths: &[PathBuf]) -> raid::Result<Vec<Arc<dyn Device>>> {
    let open = |path: &PathBuf| {
        let device = FileDevice::open(path, OpenMode::ReadWrite)?;
        Ok(Arc::new(device) as Arc<dyn Device>)
    };
    paths.iter().map(open).collect()
}

/// Whether any of them carries a superblock; one that cannot be read counts as carrying none, and then creation, which
/// refuses whatever is not blank, has the last word.
async fn any_is_member(devices: &[Arc<dyn Device>]) -> bool {
    for device in devices {
        if examine(device.as_ref()).await.is_ok() {
            return true;
        }
    }
    false
}

fn make(path: &Path, size: u64) -> Result<(), OpenError> {
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !directory.is_dir() {
        return Err(OpenError::NoDirectory {
            path: path.display().to_string(),
            directory: directory.display().to_string(),
        });
    }
    make_image(path, size).map_err(OpenError::Create)
}

/// Time after which copies that could not be made good are tried again.
const AGAIN: Duration = Duration::from_secs(60);

/// Lets the volume resync and rebuild once the store has seen to it that this can lose nothing. Ends with the store; holds
/// on to neither while it waits.
pub async fn resync_when_settled(volume: Weak<Volume>, store: Weak<Store>, runtime: Arc<dyn Runtime>) {
    while let (Some(held), Some(open)) = (volume.upgrade(), store.upgrade()) {
        match open.settle_copies().await {
            Ok(()) => return held.release_resync(),
            Err(logstore::Error::Closed | logstore::Error::Poisoned { .. }) => return,
            Err(error) => {
                tracing::warn!(
                    "the volume is not resynced, which might lose records: {error}; tried again in {} s",
                    AGAIN.as_secs()
                );
            }
        }
        drop((held, open));
        runtime.sleep(AGAIN).await;
    }
}
