//! A life of a log store in a directory, for `tests/tests/directory_power_cut.rs` to look at: `directory_life DIR ACTION…`. It
//! says on its standard output what it is about to do and what has come true; what was said is promised.
//!
//! Actions: `create:TOPIC`, `delete:TOPIC`, `stable:TOPIC:COUNT` and `cached:TOPIC:COUNT` (appends), `again:TOPIC` (the last
//! append once more, with acks=all, as a producer does that got no answer), `purge:TOPIC:BEFORE` (`DeleteRecords`),
//! `pause:MILLISECONDS`, `close`; `table:TOPIC` (one that is compacted), `keyed:TOPIC:COUNT` (appends with acks=all and three
//! keys by turns), `wide:TOPIC` (its segments may be large from now on), `compact`. Without `close` the process ends as by `kill -9`.

// A panic is how it fails.
#![allow(clippy::unwrap_used)]

use logstore::{Home, Partition, Store, StoreOptions, TopicConfig};
use raid::device::Durability;
use raid::runtime::TokioRuntime;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tests::broker::{batch_of, keyed_batch};
use uuid::Uuid;

/// The producer of everything.
const PRODUCER: i64 = 7;

fn say(what: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "{what}").and_then(|()| out.flush()).unwrap();
}

fn log_of(store: &Store, name: &str) -> (Uuid, Arc<Partition>) {
    let topic = store.topic(name).unwrap_or_else(|| panic!("there is no topic {name}"));
    (topic.id(), Arc::clone(&topic.partitions()[0]))
}

/// Appends the record of an offset, which its sequence number names as well.
async fn append(log: &Arc<Partition>, id: Uuid, offset: i64, durability: Durability) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
    let value = format!("{id} {offset} {}", "x".repeat(700));
    let batch = batch_of(&[value.as_bytes()], now, PRODUCER, 0, offset as i32);
    let appended = log.append(batch, durability).await.unwrap();
    assert_eq!(appended.base_offset, offset);
    if let Some(commit) = appended.commit {
        commit.await.unwrap();
    }
}

async fn act(store: &Store, action: &str) {
    let words: Vec<&str> = action.split(':').collect();
    match words[..] {
        ["create", name] => {
            let own = [("segment.bytes", "4096"), ("file.delete.delay.ms", "100")];
            let config = TopicConfig::kafka_defaults().with(own).unwrap();
            let topic = store.create_topic(name, 1, config).await.unwrap();
            say(&format!("made {}", topic.id()));
        }
        ["delete", name] => {
            say(&format!("deleting {}", log_of(store, name).0));
            store.delete_topic(name).await.unwrap();
        }
        ["stable" | "cached", name, count] => {
            let (id, log) = log_of(store, name);
            for _ in 0..count.parse().unwrap() {
                let offset = log.offsets().log_end;
                if words[0] == "stable" {
                    append(&log, id, offset, Durability::Stable).await;
                    say(&format!("stable {id} {offset}"));
                } else {
                    append(&log, id, offset, Durability::Cached).await;
                }
            }
        }
        ["again", name] => {
            let (id, log) = log_of(store, name);
            let offset = log.offsets().log_end - 1;
            append(&log, id, offset, Durability::Stable).await;
            say(&format!("stable {id} {offset}"));
        }
        ["purge", name, before] => {
            let (id, log) = log_of(store, name);
            say(&format!("purging {id} {before}"));
            log.delete_records_before(before.parse().unwrap()).await.unwrap();
        }
        ["table", name] => {
            let own = [
                ("segment.bytes", "4096"),
                ("cleanup.policy", "compact"),
                ("min.cleanable.dirty.ratio", "0.01"),
            ];
            let config = TopicConfig::kafka_defaults().with(own).unwrap();
            let topic = store.create_topic(name, 1, config).await.unwrap();
            say(&format!("table {}", topic.id()));
        }
        ["keyed", name, count] => {
            let (id, log) = log_of(store, name);
            for _ in 0..count.parse().unwrap() {
                let offset = log.offsets().log_end;
                let value = format!("{id} {offset} {}", "x".repeat(700));
                let batch =
                    keyed_batch(&[(&format!("k{}", offset % 3), value.as_bytes())], 1_700_000_000_000);
                log.append(batch, Durability::Stable).await.unwrap().commit.unwrap().await.unwrap();
                say(&format!("stable {id} {offset}"));
            }
        }
        ["wide", name] => {
            let config = store.topic(name).unwrap().config();
            let mut config = TopicConfig::clone(&config);
            config.set("segment.bytes", "1000000").unwrap();
            store.configure_topic(name, config).await.unwrap();
        }
        ["compact"] => {
            store.quiet().await;
            say("compacting");
            assert_eq!(store.compact().await.unwrap(), 1);
            say("compacted");
        }
        ["pause", millis] => tokio::time::sleep(Duration::from_millis(millis.parse().unwrap())).await,
        ["close"] => store.close().await.unwrap(),
        _ => panic!("{action} is no action"),
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().expect("directory_life DIR ACTION…"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let runtime = Arc::new(TokioRuntime::current());
        let store = Store::open(Home::Directory(dir), StoreOptions::default(), runtime).await.unwrap();
        say("open");
        for action in arguments {
            act(&store, &action).await;
        }
        // Nothing is put in order on the way out.
        std::process::abort();
    });
}
