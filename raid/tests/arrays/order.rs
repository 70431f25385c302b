//! Changes that overlap are made in the order in which they were first polled, whoever waits for them how long. What is
//! served to clients that ask twice relies on it.

use crate::images::{Array, pattern};
use crate::odd::Odd;
use raid::create::Bitmap;
use raid::device::{Device, Durability, Io, ZeroMode, buffer};
use raid::status::MemberState;
use std::fs::File;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

const CHUNK: u64 = 64 << 10;

/// Polls once; panics if that was all there was to it.
async fn begin(change: &mut Io<'_, ()>) {
    let polled = poll_fn(|cx| Poll::Ready(change.as_mut().poll(cx))).await;
    assert!(polled.is_pending(), "the members are held back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_overlap_are_made_in_the_order_in_which_they_were_first_polled() {
    let array = Array::new("n2", &[4 << 20; 2], CHUNK, Bitmap::STANDARD).await;
    let odd: Vec<Arc<Odd>> = array.devices().into_iter().map(|under| Odd::new(under, true)).collect();
    let members = odd.iter().map(|member| Arc::clone(member) as Arc<dyn Device>).collect();
    let volume = array.start_with(members).await;
    let len = 2 * CHUNK;
    for last in 0..3 {
        let (old, new) = (pattern(1 + last, len), pattern(7 + last, len));
        volume.write(0, pattern(4, len), Durability::Cached).await.unwrap();
        for member in &odd {
            member.hold();
        }
        let mut changes = vec![
            volume.write(0, old.clone(), Durability::Cached),
            volume.discard(0, len),
            volume.write_zeroes(0, len, ZeroMode::MayPunch, Durability::Stable),
            volume.write(0, new.clone(), Durability::Cached),
        ];
        // Each of the last three has its turn to be the last one that is polled.
        let at = 1 + last as usize;
        let latest = changes.remove(at);
        changes.push(latest);
        for change in &mut changes {
            begin(change).await;
        }
        for member in &odd {
            member.let_go();
        }
        // Asked for in the other order, and one of them by nobody any more.
        for change in changes.into_iter().skip(1).rev() {
            change.await.unwrap();
        }
        let expected = if last == 2 { new } else { vec![0; len as usize].into() };
        for copy in 0..2 {
            let read = volume.read_copy(0, buffer(len as usize), copy).await.unwrap();
            assert!(read == expected, "the last of {last}, copy {copy}");
        }
    }
    array.stop(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zeroes_are_asked_for_in_parts_so_that_no_member_is_late_with_all_of_them() {
    const MIB: u64 = 1 << 20;
    let array = Array::new("n2", &[160 * MIB; 2], CHUNK, Bitmap::STANDARD).await;
    let odd: Vec<Arc<Odd>> = array.devices().into_iter().map(|under| Odd::new(under, true)).collect();
    let members = odd.iter().map(|member| Arc::clone(member) as Arc<dyn Device>).collect();
    let volume = array.start_with(members).await;
    let (at, len) = (5 * CHUNK + 700, 140 * MIB);
    let places = [at - 8, at + 3, at + 64 * MIB, at + len - 8, at + len];
    for durability in [Durability::Cached, Durability::Stable] {
        for place in places {
            volume.write(place, pattern(place, 8), Durability::Cached).await.unwrap();
        }
        volume.write_zeroes(at, len, ZeroMode::MayPunch, durability).await.unwrap();
        for place in places {
            let found = volume.read(place, buffer(8)).await.unwrap();
            let is_inside = (at..at + len).contains(&place);
            assert_eq!(found == [0; 8][..], is_inside, "at {place}: {found:?}");
            assert!(is_inside || found == pattern(place, 8), "at {place}: {found:?}");
        }
    }
    for member in &odd {
        assert!((1..=64 * MIB).contains(&member.longest_zeroes()), "{}", member.longest_zeroes());
    }
    array.stop(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_long_for_the_short_way_leaves_no_trace_of_the_try() {
    const MIB: u64 = 1 << 20;
    let array = Array::in_memory("n2", &[16 * MIB; 2], 4 * MIB).await;
    let volume = array.start().await;
    // The first write makes the region dirty, the long way.
    volume.write(0, pattern(1, 8192), Durability::Cached).await.unwrap();
    let long = pattern(2, 2 * MIB);
    assert!(!volume.write_now(0, &long), "2 MiB in the call");
    assert!(!volume.may_differ(0, 2 * MIB), "nothing was written");
    assert!(volume.write_now(4096, &pattern(3, 4096)), "4 KiB in the call");
    let mut found = vec![0; 8192];
    assert!(volume.read_now(0, &mut found));
    assert!(found[..4096] == pattern(1, 8192)[..4096] && found[4096..] == pattern(3, 4096)[..]);
    // A leg that was cut short, which is seen in the next tick of the clock: the long way tells why.
    File::options().write(true).open(&array.paths[1]).unwrap().set_len(8 * MIB).unwrap();
    let (end, since) = (volume.size() - 4096, Instant::now());
    while volume.write_now(end, &pattern(4, 4096)) {
        assert!(since.elapsed() < Duration::from_secs(60), "a member is shorter than it promised");
    }
    volume.write(end, pattern(4, 4096), Durability::Cached).await.unwrap();
    assert!(volume.status().members.iter().any(|member| member.state == MemberState::Faulty));
    assert_eq!(volume.read(end, buffer(4096)).await.unwrap(), pattern(4, 4096));
    array.crash(volume).await;
}
