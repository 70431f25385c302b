//! `raid10 create`: a new array, on devices that exist or image files made for it.

use super::say;
use crate::create::{Bitmap, CreateOptions, create_with_spares, make_image};
use crate::device::{Device, FileDevice, OpenMode};
use crate::error::{Error, Result};
use crate::geometry::Layout;
use crate::runtime::TokioRuntime;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Make a new array of files or block devices.
///
/// Prints the array's UUID. Existing data or superblocks on a member are refused without --force.
#[derive(Debug, clap::Args)]
pub(super) struct Create {
    /// Files or block devices, in the order of their slots.
    #[arg(required = true, value_name = "MEMBER")]
    members: Vec<PathBuf>,
    /// Make members that do not exist: sparse image files of that size each.
    #[arg(long, value_parser = super::size::parse)]
    size: Option<u64>,
    /// How copies are laid out: n2 for two near copies, f2 for far, o2 for offset ones; n2f2 mixes near and far.
    #[arg(long, default_value = "n2")]
    layout: Layout,
    /// Bytes of one chunk: a power of two from 4K to 64M.
    #[arg(long, default_value = "512K", value_parser = super::size::parse)]
    chunk: u64,
    /// The array's name, 1 to 32 bytes; made up if not given.
    #[arg(long)]
    name: Option<String>,
    /// Note on the members what is being written, so that only that is made equal after a crash: internal or none.
    #[arg(long, value_enum, default_value_t = Kind::Internal)]
    bitmap: Kind,
    /// Bytes that one bit of the bitmap stands for: a power of two from 4K to 2G. Smaller ones cost more writes, and
    /// leave less to do after a crash. [default: 64M, or more where the bitmap would take over 128K]
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    bitmap_chunk: Option<u64>,
    /// A file or block device that waits to take the place of a member that fails; made like a member with --size.
    #[arg(long, value_name = "PATH")]
    spare: Vec<PathBuf>,
    /// Promise that the copies are equal already: no first resync.
    #[arg(long)]
    assume_clean: bool,
    /// Destroy what is on the members.
    #[arg(long)]
    force: bool,
}

/// Whether a new array has a write-intent bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Internal,
    None,
}

impl Create {
    /// The bitmap that is wanted. Ends the process where the flags contradict each other.
    fn bitmap(&self) -> Bitmap {
        match (self.bitmap, self.bitmap_chunk) {
            (Kind::Internal, region) => Bitmap::Internal { region },
            (Kind::None, None) => Bitmap::None,
            (Kind::None, Some(_)) => super::wrong_usage("--bitmap-chunk needs --bitmap internal"),
        }
    }

    pub(super) async fn run(self) -> Result<()> {
        let bitmap = self.bitmap();
        let mut made = MadeFiles(Vec::new());
        let mut members: Vec<Arc<dyn Device>> = Vec::with_capacity(self.members.len());
        for path in self.members.iter().chain(&self.spare) {
            if !exists(path)? {
                let size =
                    self.size.ok_or_else(|| Error::NoSuchMember { device: path.display().to_string() })?;
                make_image(path, size)?;
                made.0.push(path.clone());
            }
            members.push(Arc::new(FileDevice::open(path, OpenMode::ReadWrite)?));
        }
        let spares = members.split_off(self.members.len());
        let name = self.name.unwrap_or_else(|| {
            let random = Uuid::new_v4().simple().to_string();
            format!("raid10-{}", &random[..8])
        });
        let options = CreateOptions {
            name,
            layout: self.layout,
            chunk: self.chunk,
            bitmap,
            assume_clean: self.assume_clean,
            force: self.force,
        };
        let uuid = create_with_spares(&members, &spares, &options, &TokioRuntime::current()).await?;
        made.0.clear();
        say(&uuid.to_string());
        Ok(())
    }
}

/// Whether something is there, a dangling symbolic link included: nothing may be made in its place.
fn exists(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::Open {
            device: path.display().to_string(),
            errno: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
        }),
    }
}

/// Image files made by this call. What is left in it when it is dropped is removed: the creation failed.
struct MadeFiles(Vec<PathBuf>);

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("{}: made by this call, and cannot be removed: {error}", path.display());
            }
        }
    }
}
