//! What takes records out of a log: `DeleteRecords`, retention, compaction; on both homes.

use super::common::*;
use logstore::{Error, ReadLimit, Store};
use std::sync::Arc;

#[test]
fn records_are_deleted_up_to_an_offset_for_good() {
    for place in Place::both() {
        place.run(async |store: Arc<Store>| {
            let own = [("segment.bytes", "4000"), ("file.delete.delay.ms", "0")];
            let log = topic(&store, "t", &own).await;
            for at in 0..60 {
                append(&log, &batch(&["a".repeat(300).as_str(), "b", "c"]).by(3, 0, at * 3)).await;
            }
            let size = log.size();
            for outside in [-1, 181, i64::MAX] {
                let refused = log.delete_records_before(outside).await;
                assert!(matches!(refused, Err(Error::OffsetOutOfRange { .. })), "{outside}");
            }
            assert_eq!(log.delete_records_before(0).await.unwrap(), 0);
            assert_eq!(log.delete_records_before(100).await.unwrap(), 100, "in the middle of a batch");
            assert_eq!(log.delete_records_before(50).await.unwrap(), 100, "it never goes back");
            assert_eq!(log.offsets().log_start, 100);
            assert!(log.size() < size * 6 / 10, "whole segments went");
            let below = log.read(99, 1, ReadLimit::HighWatermark, true).await;
            assert!(matches!(below, Err(Error::OffsetOutOfRange { log_start: 100, .. })));
            assert_eq!(read_all(&log).await.first().unwrap().0, 99, "its batch is whole");
        });
        // Nobody closed it: what was answered is there all the same.
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!((log.offsets().log_start, log.offsets().log_end), (100, 180));
            assert_eq!(
                log.delete_records_before(180).await.unwrap(),
                180,
                "all of it, the active segment too"
            );
            assert_eq!(log.size(), 0);
            assert!(log.read(180, 1, ReadLimit::HighWatermark, true).await.unwrap().is_empty());
        });
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!((log.offsets().log_start, log.offsets().log_end), (180, 180));
            assert_eq!(append(&log, &batch(&["d"])).await, 180);
        });
        // A log that was closed in order and not appended to since.
        place.run(async |store: Arc<Store>| {
            assert_eq!(first(&store, "t").delete_records_before(181).await.unwrap(), 181);
        });
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!((log.offsets().log_start, log.offsets().log_end, log.size()), (181, 181, 0));
            assert_eq!(append_stable(&log, &batch(&["e"])).await, 181);
            assert_eq!(read_all(&log).await.len(), 1);
        });
    }
}
