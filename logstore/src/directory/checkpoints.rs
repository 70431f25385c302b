//! Writing Kafka's offset checkpoints ([`crate::checkpoints`]) beside the partitions of a data directory.
//!
//! Order of events: what a row says is durable in the log or in the catalog; then the new text is written to `<name>.tmp`,
//! synced, renamed to `<name>`, and the directory is synced. A power cut leaves the old file or the new one, and perhaps a
//! `.tmp`, which the next start removes. When a topic is deleted its rows go before another may take its name; for the same
//! reason a start writes anew what is not as it should be.
//!
//! Nothing is lost with one that cannot be written: whoever asked is told, and the next time comes.
//!
//! Cost: the text is made and compared with the last (about 100 ns a partition); two syncs where it has changed, on a
//! blocking thread. Memory: the last text of each, about 30 bytes a partition and file.

use super::{at, blocking, remove_file, replace};
use crate::checkpoints::Checkpoint;
use crate::error::Result;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Larger than any of ours, which have some ten bytes and a name for each partition; a file that is larger is written anew.
const LARGEST: u64 = 16 << 20;

/// The checkpoints of a data directory.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    root: PathBuf,
    /// What each file holds, by the order of [`Checkpoint::ALL`]; `None` when that is not known. Locked while it is written.
    held: [Arc<tokio::sync::Mutex<Option<Vec<u8>>>>; 4],
}

/// The bytes of a checkpoint, if there is one.
pub(super) fn read(root: &Path, of: Checkpoint) -> Result<Option<Vec<u8>>> {
    let path = root.join(of.file_name());
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        outcome => at("open", &path, outcome)?,
    };
    let mut bytes = Vec::new();
    at("read", &path, file.take(LARGEST + 1).read_to_end(&mut bytes))?;
    if bytes.len() as u64 > LARGEST {
        let what = "it is larger than any checkpoint";
        return at("read", &path, Err(io::Error::new(io::ErrorKind::FileTooLarge, what)));
    }
    Ok(Some(bytes))
}

impl Checkpoints {
    /// Looks at what is there, to be able to tell what has changed, and removes what a stop has left half-written.
    pub(super) async fn open(root: &Path) -> Result<Self> {
        let path = root.to_owned();
        let held = blocking(move || {
            let mut held = [const { None }; 4];
            for of in Checkpoint::ALL {
                // No start fails for what nothing here depends on: the writing says what is in its way.
                remove_file(&path.join(format!("{}.tmp", of.file_name())))
                    .unwrap_or_else(|error| tracing::warn!("{error}"));
                held[of as usize] = read(&path, of).unwrap_or_else(|error| {
                    tracing::warn!("{error}; it is written anew");
                    None
                });
            }
            Ok(held)
        })
        .await?;
        Ok(Self { root: root.to_owned(), held: held.map(|held| Arc::new(tokio::sync::Mutex::new(held))) })
    }

    /// Brings one up to date with the text that `text` makes; returns whether it was written. The text is made under its
    /// lock, so that an older one never takes the place of a newer.
    pub(crate) async fn write(&self, of: Checkpoint, text: impl FnOnce() -> String + Send) -> Result<bool> {
        let mut held = Arc::clone(&self.held[of as usize]).lock_owned().await;
        let text = text().into_bytes();
        if held.as_ref() == Some(&text) {
            return Ok(false);
        }
        let path = self.root.join(of.file_name());
        // Locked until it is there, even if whoever asked goes away: two at a time would take each other's `.tmp`.
        blocking(move || {
            // Until it is there for certain, it may be either.
            *held = None;
            replace(&path, &text)?;
            *held = Some(text);
            Ok(true)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[tokio::test]
    async fn one_is_written_when_it_has_changed_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cleaner-offset-checkpoint");
        let tmp = dir.path().join("cleaner-offset-checkpoint.tmp");
        fs::write(&tmp, "half of").unwrap();
        let all = Checkpoints::open(dir.path()).await.unwrap();
        assert!(!tmp.exists());
        let write =
            async |all: &Checkpoints, text: &str| all.write(Checkpoint::Cleaner, || text.to_owned()).await;
        assert!(write(&all, "one").await.unwrap());
        assert!(!write(&all, "one").await.unwrap());
        assert!(write(&all, "other").await.unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
        let again = Checkpoints::open(dir.path()).await.unwrap();
        assert!(!write(&again, "other").await.unwrap(), "a start writes what has changed only");
        // No room, in the simplest way: the name is taken by a directory. The old one stays, and it goes on afterwards.
        fs::create_dir(&tmp).unwrap();
        write(&again, "third").await.unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
        fs::remove_dir(&tmp).unwrap();
        assert!(write(&again, "third").await.unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "third");
        assert!(!tmp.exists());
    }
}
