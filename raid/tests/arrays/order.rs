//! Changes that overlap are made in the order in which they were first polled, whoever waits for them how long. What is
//! served to clients that ask twice relies on it.

use crate::images::{Array, pattern};
use crate::odd::Odd;
use raid::create::Bitmap;
use raid::device::{Device, Durability, Io, ZeroMode, buffer};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

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
