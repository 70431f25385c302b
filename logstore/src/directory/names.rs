//! Kafka's names for files and directories. Pure.

use crate::catalog::records::Swap;
use crate::ids;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Ending of the directory of a deleted topic's partition.
pub(super) const DELETED: &str = "-delete";
/// Longest name a file system takes, in bytes.
const LONGEST: usize = 255;

/// A partition's directory.
pub(super) fn partition_dir(root: &Path, topic: &str, partition: u32) -> PathBuf {
    root.join(format!("{topic}-{partition}"))
}

/// What that directory is called once the topic is deleted. The id keeps it apart from a later topic's of the name.
pub(super) fn deleted_dir(root: &Path, topic: &str, id: Uuid, partition: u32) -> PathBuf {
    let tail = format!("-{partition}.{}{DELETED}", id.simple());
    let keep = topic.len().min(LONGEST - tail.len());
    // Topic names are ASCII, so any length is a boundary.
    root.join(format!("{}{tail}", topic.get(..keep).unwrap_or_default()))
}

/// Whether a directory's name is that of a partition: `<topic>-<number>`.
pub(super) fn is_partition_dir(name: &str) -> bool {
    name.rsplit_once('-').is_some_and(|(topic, number)| {
        !topic.is_empty() && !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
    })
}

/// A file of a partition, named by an offset.
pub(crate) fn offset_file(dir: &Path, offset: i64, extension: &str) -> PathBuf {
    dir.join(format!("{offset:020}.{extension}"))
}

/// A segment that compaction is writing.
pub(super) fn cleaned_file(dir: &Path, swap: Swap) -> PathBuf {
    let Swap { base, turn, .. } = swap;
    dir.join(format!("{base:020}.log.{turn}.cleaned"))
}

/// A file that is about to take the place of the one of its kind.
pub(super) fn swap_file(dir: &Path, kind: &str, swap: Swap) -> PathBuf {
    let Swap { base, end, turn } = swap;
    dir.join(format!("{base:020}.{kind}.{end:020}.{turn}.swap"))
}

/// Whether a file is one of those two.
pub(super) fn is_of_compaction(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    match name.split('.').collect::<Vec<_>>()[..] {
        [base, "log", turn, "cleaned"] => is_number(base) && is_number(turn),
        [base, _, end, turn, "swap"] => [base, end, turn].into_iter().all(is_number),
        _ => false,
    }
}

/// The offset in the name of a file with this extension.
pub(super) fn offset_of(name: &str, extension: &str) -> Option<i64> {
    let stem = name.strip_suffix(extension)?.strip_suffix('.')?;
    if stem.len() != 20 || !stem.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    stem.parse().ok()
}

/// The text of `partition.metadata`.
pub(crate) fn partition_metadata(topic: Uuid) -> String {
    format!("version: 0\ntopic_id: {}\n", ids::base64(topic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kafkas() {
        let root = Path::new("/data");
        assert_eq!(partition_dir(root, "a-1", 7), Path::new("/data/a-1-7"));
        assert!(is_partition_dir("a-1-7") && is_partition_dir("a-0"));
        assert!(!is_partition_dir("a-") && !is_partition_dir("-3") && !is_partition_dir("a-3.x-delete"));
        assert_eq!(offset_file(root, 42, "log"), Path::new("/data/00000000000000000042.log"));
        assert_eq!(offset_of("00000000000000000042.log", "log"), Some(42));
        for bad in
            ["42.log", "00000000000000000042.index", "0000000000000000004x.log", "99999999999999999999.log"]
        {
            assert_eq!(offset_of(bad, "log"), None, "{bad}");
        }
        let swap = Swap { base: 42, end: 50, turn: 3 };
        let of_compaction =
            [cleaned_file(root, swap), swap_file(root, "log", swap), swap_file(root, "index", swap)];
        for path in of_compaction {
            assert!(is_of_compaction(path.file_name().unwrap().to_str().unwrap()), "{path:?}");
        }
        for own in [
            "00000000000000000042.log",
            "00000000000000000042.index",
            "00000000000000000042.log.swap",
            "x.log.1.cleaned",
            "1.log.2.swap",
        ] {
            assert!(!is_of_compaction(own), "{own}");
        }
    }

    #[test]
    fn the_longest_topic_can_be_deleted() {
        let path = deleted_dir(Path::new("/"), &"t".repeat(249), Uuid::from_u128(5), 4_000_000_000);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.len() <= 255 && name.ends_with("-delete"));
    }
}
