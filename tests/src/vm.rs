//! A Debian kernel in QEMU, for what only a kernel has: the real md, and the kernel's own NBD client. Needs neither KVM
//! nor a kernel module of the host; a boot takes seconds.
//!
//! The kernel is Debian's package of the day, unpacked by `tests/run`; the root is an initramfs built here: busybox,
//! md's and NBD's tools with their libraries, the modules, and the test's script. Drives are the test's image files,
//! found in the guest as `/dev/drive/NAME`; the host's loopback is at 10.0.2.2. What the script prints is the result.

use crate::clients::peers;
use crate::process::{Sandbox, run_within, succeed};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Loaded in this order: each stands after what it needs. One that a kernel has built in is passed over.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "crc16",
    "mbcache",
    "jbd2",
    "crc32c_generic",
    "libcrc32c",
    "ext4",
    "xfs",
    "md-mod",
    "raid10",
    "nbd",
];

/// In the guest as `/tools/NAME`: by their names alone, the shell would take busybox's own for some of them.
const TOOLS: &[&str] = &["mdadm", "nbd-client", "mke2fs", "e2fsck", "mkfs.xfs"];

/// A line of a script after which the machine may end in any way: what was printed before it is the result.
pub const DONE: &str = "echo '=== done'\n";
/// A line of a script that stops the machine as a power cut does. md's own end of work at a shutdown is not run.
pub const POWER_CUT: &str = "echo b > /proc/sysrq-trigger\n";

/// Boots, runs `script` under `sh -e` and powers off; gives what the script printed. Panics with the whole console when
/// the script failed, or the machine did not end within `limit`.
#[must_use]
pub fn boot(sandbox: &Sandbox, drives: &[(&str, &Path)], script: &str, limit: Duration) -> String {
    boot_with(sandbox, drives, &[], 1, script, limit)
}

/// The same, with further programs in `/tools`, and so many processors.
#[must_use]
pub fn boot_with(
    sandbox: &Sandbox,
    drives: &[(&str, &Path)],
    programs: &[PathBuf],
    processors: usize,
    script: &str,
    limit: Duration,
) -> String {
    let kernel = Kernel::find();
    let initramfs = initramfs(sandbox, &kernel, programs, script);
    let mut qemu = sandbox.command("qemu-system-x86_64");
    qemu.args([
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-smp",
        &processors.to_string(),
        "-m",
        "768",
        "-no-reboot",
        "-nodefaults",
        "-nographic",
    ]);
    qemu.args([
        "-serial",
        "stdio",
        "-netdev",
        "user,id=net",
        "-device",
        "virtio-net-pci,netdev=net,romfile=",
    ]);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]).arg("-kernel").arg(&kernel.image);
    qemu.arg("-initrd").arg(&initramfs);
    for (at, (name, path)) in drives.iter().enumerate() {
        // Eight functions a slot: there are more drives than slots.
        let (slot, function) = (8 + at / 8, at % 8);
        let file = path.display();
        qemu.args(["-drive", &format!("file={file},format=raw,if=none,id={name},cache.no-flush=on")]);
        let device =
            format!("virtio-blk-pci,drive={name},serial={name},addr={slot:#x}.{function},multifunction=on");
        qemu.args(["-device", &device]);
    }
    let ended = run_within(&mut qemu, limit);
    let console = ended.stdout.replace('\r', "");
    let began = console.split_once("=== script\n").map(|(_, rest)| rest);
    let output = began.and_then(|rest| rest.split_once("=== done\n")).map(|(output, _)| output);
    match output {
        Some(output) => output.to_owned(),
        None => panic!(
            "the script in the virtual machine failed ({}):\n{}\n{console}",
            ended.status, ended.stderr
        ),
    }
}

/// The values a script printed as `KEY VALUE` after `RESULT`.
#[must_use]
pub fn results(output: &str) -> HashMap<&str, &str> {
    let lines = output.lines().filter_map(|line| line.strip_prefix("RESULT "));
    lines.filter_map(|line| line.split_once(' ')).collect()
}

/// Drives that bear the names of their image files.
#[must_use]
pub fn drives(images: &[PathBuf]) -> Vec<(&str, &Path)> {
    let name = |path: &'_ PathBuf| path.file_name().and_then(|name| name.to_str()).map(str::len);
    images
        .iter()
        .map(|path| {
            let whole = path.to_str().expect("UTF-8");
            (&whole[whole.len() - name(path).expect("images have names")..], path.as_path())
        })
        .collect()
}

struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    fn find() -> Self {
        let root = peers().join("kernel");
        let image =
            entries(&root.join("boot")).into_iter().find(|path| name_of(path).starts_with("vmlinuz-"));
        let image = image
            .unwrap_or_else(|| panic!("no kernel in {}: run tests/run, which fetches it", root.display()));
        // Debian 12 has lib/modules, later releases usr/lib/modules.
        let homes = [root.join("lib/modules"), root.join("usr/lib/modules")];
        let modules = homes.iter().filter(|home| home.is_dir()).flat_map(|home| entries(home)).next();
        Self { image, modules: modules.unwrap_or_else(|| panic!("no modules in {}", root.display())) }
    }
}

fn initramfs(sandbox: &Sandbox, kernel: &Kernel, programs: &[PathBuf], script: &str) -> PathBuf {
    let root = sandbox.join("initramfs");
    for dir in ["bin", "tools", "dev", "proc", "sys", "tmp", "run", "etc", "mnt", "modules"] {
        fs::create_dir_all(root.join(dir)).expect("the sandbox can be written");
    }
    let busybox = which("busybox");
    copy(&busybox, &root.join("bin/busybox"));
    let mut libraries = BTreeSet::new();
    for path in TOOLS.iter().map(|tool| which(tool)).chain(programs.iter().cloned()) {
        copy(&path, &root.join("tools").join(name_of(&path)));
        libraries.extend(libraries_of(&path));
    }
    for library in libraries {
        let to = root.join(library.strip_prefix("/").expect("ldd prints whole paths"));
        fs::create_dir_all(to.parent().expect("a file lies in a directory"))
            .expect("the sandbox can be written");
        copy(&library, &to);
    }
    let mut load = String::new();
    for module in modules(kernel, &root.join("modules")) {
        writeln!(load, "insmod /modules/{module}.ko").expect("a String takes all");
    }
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin MDADM_NO_UDEV=1\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run\n\
         {load}\
         mkdir -p /dev/drive /dev/md\n\
         for block in /sys/block/vd*; do ln -s /dev/${{block##*/}} /dev/drive/$(cat $block/serial); done\n\
         ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0\n\
         echo '=== script'\n\
         sh -e /script 2>&1 && echo '=== done'\n\
         poweroff -f\n"
    );
    write_program(&root.join("init"), &init);
    write_program(&root.join("script"), script);
    let archive = sandbox.join("initramfs.cpio");
    let pack =
        format!("cd '{}' && find . | cpio -o -H newc --quiet > '{}'", root.display(), archive.display());
    succeed(Command::new("sh").args(["-c", &pack]));
    archive
}

/// Copies the modules there are, uncompressed; gives their names in order of loading.
fn modules(kernel: &Kernel, to: &Path) -> Vec<&'static str> {
    let builtin = fs::read_to_string(kernel.modules.join("modules.builtin"))
        .expect("a kernel lists what it has built in");
    let all = files_under(&kernel.modules.join("kernel"));
    let named = |path: &Path, module: &str| {
        let name = name_of(path).replace('_', "-");
        name.split_once(".ko").is_some_and(|(stem, _)| stem == module.replace('_', "-"))
    };
    let mut loaded = Vec::new();
    for module in MODULES {
        let Some(found) = all.iter().find(|path| named(path, module)) else {
            let known = builtin.lines().any(|line| named(Path::new(line), module));
            assert!(known, "the kernel in {} has no module {module}", kernel.modules.display());
            continue;
        };
        let plain = to.join(format!("{module}.ko"));
        match found.extension().and_then(|ext| ext.to_str()) {
            Some("xz") => {
                let unpack = format!("xz -dc '{}' > '{}'", found.display(), plain.display());
                succeed(Command::new("sh").args(["-c", &unpack]));
            }
            _ => copy(found, &plain),
        }
        loaded.push(*module);
    }
    loaded
}

/// Where a program of this machine lies.
#[must_use]
pub fn which(tool: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').chain(["/usr/local/sbin", "/usr/sbin", "/sbin"]);
    let found = dirs.map(|dir| Path::new(dir).join(tool)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no program {tool}: run tests/run, which installs it"))
}

/// The shared libraries a program needs, the loader among them.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let listed = succeed(Command::new("ldd").arg(program));
    let words = listed.split_whitespace().filter(|word| word.starts_with('/'));
    words.map(PathBuf::from).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap_or_else(|e| panic!("copy {} to {}: {e}", from.display(), to.display()));
}

fn write_program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).expect("the sandbox can be written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("the file is ours");
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let read =
        fs::read_dir(dir).map(|entries| entries.map_while(Result::ok).map(|entry| entry.path()).collect());
    read.unwrap_or_default()
}

fn files_under(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in entries(dir) {
        if path.is_dir() {
            found.extend(files_under(&path));
        } else {
            found.push(path);
        }
    }
    found
}
