//! Arrays on image files in a temporary directory, for tests that look into the images past the engine.

use bytes::Bytes;
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, FileDevice, OpenMode};
use raid::event::Event;
use raid::geometry::{Chunk, Geometry, Layout, Place};
use raid::runtime::{BoxFuture, Runtime, TokioRuntime};
use raid::superblock::{SUPER_BYTES, SUPER_OFFSET, Superblock};
use raid::volume::{AssembleOptions, Volume};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::broadcast::Receiver;
use tokio::task::JoinHandle;

/// Tokio's runtime, with a list of the tasks that were started: a volume's images can be opened again only once they
/// have ended, which may be a moment after the volume was dropped.
pub struct Tasks {
    tokio: TokioRuntime,
    started: Mutex<Vec<JoinHandle<()>>>,
}

impl Tasks {
    fn new() -> Arc<Self> {
        Arc::new(Self { tokio: TokioRuntime::current(), started: Mutex::default() })
    }

    async fn ended(&self) {
        let started = std::mem::take(&mut *self.started.lock().unwrap());
        for task in started {
            task.await.unwrap();
        }
    }
}

impl Runtime for Tasks {
    fn now(&self) -> Duration {
        self.tokio.now()
    }

    fn wall_clock(&self) -> Duration {
        self.tokio.wall_clock()
    }

    fn fill_random(&self, out: &mut [u8]) {
        self.tokio.fill_random(out);
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.started.lock().unwrap().push(tokio::spawn(task));
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        self.tokio.sleep(time)
    }
}

pub fn open(path: &Path) -> Arc<dyn Device> {
    Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap())
}

/// An array on new image files.
pub struct Array {
    _dir: tempfile::TempDir,
    pub paths: Vec<PathBuf>,
    pub geometry: Geometry,
    /// First byte of the data area in each image.
    pub data_start: u64,
    tasks: Arc<Tasks>,
}

impl Array {
    /// With members of `sizes` bytes, that are promised to be equal: all of it counts as written, and is compared.
    pub async fn new(layout: &str, sizes: &[u64], chunk: u64, bitmap: Bitmap) -> Self {
        Self::create(layout, sizes, chunk, bitmap, true).await
    }

    /// One of which nothing was ever written, and that knows it.
    pub async fn untouched(layout: &str, sizes: &[u64], chunk: u64) -> Self {
        // Small regions: what was written is told apart from its neighbours.
        Self::create(layout, sizes, chunk, Bitmap::Internal { region: Some(chunk) }, false).await
    }

    /// One on files in memory, where small operations are done in the call.
    pub async fn in_memory(layout: &str, sizes: &[u64], chunk: u64) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        Self::create_in(dir, layout, sizes, chunk, Bitmap::STANDARD, true).await
    }

    async fn create(layout: &str, sizes: &[u64], chunk: u64, bitmap: Bitmap, assume_clean: bool) -> Self {
        Self::create_in(tempfile::tempdir().unwrap(), layout, sizes, chunk, bitmap, assume_clean).await
    }

    async fn create_in(
        dir: tempfile::TempDir,
        layout: &str,
        sizes: &[u64],
        chunk: u64,
        bitmap: Bitmap,
        assume_clean: bool,
    ) -> Self {
        let paths: Vec<PathBuf> = (0..sizes.len()).map(|i| dir.path().join(format!("disk{i}"))).collect();
        for (path, size) in paths.iter().zip(sizes) {
            make_image(path, *size).unwrap();
        }
        let layout: Layout = layout.parse().unwrap();
        let (name, force) = ("test".to_owned(), false);
        let options = CreateOptions { name, layout, chunk, bitmap, assume_clean, force };
        let devices: Vec<_> = paths.iter().map(|path| open(path)).collect();
        let tasks = Tasks::new();
        create(&devices, &options, tasks.as_ref()).await.unwrap();
        let superblock = superblock(&paths[0]);
        let (geometry, data_start) = (superblock.geometry().unwrap(), superblock.data_start());
        Self { _dir: dir, paths, geometry, data_start, tasks }
    }

    pub fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.paths.iter().map(|path| open(path)).collect()
    }

    pub async fn start(&self) -> Arc<Volume> {
        self.start_with(self.devices()).await
    }

    pub async fn start_with(&self, devices: Vec<Arc<dyn Device>>) -> Arc<Volume> {
        self.try_start(devices, AssembleOptions::default()).await.unwrap()
    }

    pub async fn try_start(
        &self,
        devices: Vec<Arc<dyn Device>>,
        options: AssembleOptions,
    ) -> raid::Result<Arc<Volume>> {
        Volume::assemble(devices, options, Arc::clone(&self.tasks) as Arc<dyn Runtime>).await
    }

    /// Stops a volume of this array; its images can be opened again then.
    pub async fn stop(&self, volume: Arc<Volume>) {
        volume.stop().await.unwrap();
        self.crash(volume).await;
    }

    /// Drops a volume of this array without stopping it.
    pub async fn crash(&self, volume: Arc<Volume>) {
        drop(volume);
        self.tasks.ended().await;
    }

    /// Where a copy of a chunk begins: the image and the byte in it. Copies are numbered in slot order.
    pub fn copy(&self, chunk: u64, copy: usize) -> (PathBuf, u64) {
        let mut places: Vec<Place> = self.geometry.places(Chunk(chunk)).collect();
        places.sort_unstable();
        (self.paths[places[copy].slot.0].clone(), self.data_start + places[copy].at.0)
    }

    /// All copies of the array, read past the engine: as many contents as there are copies.
    pub fn contents(&self, geometry: &Geometry) -> Vec<Vec<u8>> {
        let files: Vec<File> = self.paths.iter().map(|path| File::open(path).unwrap()).collect();
        let mut contents = vec![vec![0; geometry.size() as usize]; geometry.copies()];
        for chunk in 0..geometry.size() / geometry.chunk() {
            let range = (chunk * geometry.chunk()) as usize..((chunk + 1) * geometry.chunk()) as usize;
            let mut places: Vec<Place> = geometry.places(Chunk(chunk)).collect();
            places.sort_unstable();
            for (content, place) in contents.iter_mut().zip(places) {
                let at = self.data_start + place.at.0;
                files[place.slot.0].read_exact_at(&mut content[range.clone()], at).unwrap();
            }
        }
        contents
    }
}

pub fn superblock(path: &Path) -> Superblock {
    let file = File::open(path).unwrap();
    let mut bytes = [0; SUPER_BYTES];
    file.read_exact_at(&mut bytes, SUPER_OFFSET).unwrap();
    Superblock::decode(&bytes, file.metadata().unwrap().len()).unwrap()
}

/// Flips bytes of a file.
pub fn flip(path: &Path, at: u64, len: usize) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    for byte in &mut bytes {
        *byte ^= 0xff;
    }
    file.write_all_at(&bytes, at).unwrap();
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u64, len: u64) -> Bytes {
    let word = |i: u64| (i ^ seed << 40).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..len.div_ceil(8)).flat_map(|i| word(i).to_le_bytes()).take(len as usize).collect()
}

/// The next event that `wanted` takes something from.
pub async fn next<T>(events: &mut Receiver<Event>, wanted: impl Fn(Event) -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = wanted(events.recv().await.unwrap()) {
                return found;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("the event did not come")
}
