//! Doing what was admitted, and what that is answered.

use super::super::wire::{Descriptor, ErrorCode, STATE_HOLE, STATE_ZERO, Style};
use super::admit::{Admitted, admit_filter};
use super::memory::Lease;
use super::pipes::Pipes;
use super::reply::{Found, Refusal, Reply, To};
use super::tray::Tray;
use crate::device::{Device, Durability, Piece, buffer};
use crate::error::Error;
use bytes::Bytes;
use futures_util::future::join_all;
use std::ops::Range;
use std::sync::Arc;

/// Parts that one sparse read is answered in at most; beyond that it is read as a whole.
const MAX_PARTS: usize = 64;

/// Bytes of a read that is tried at once: the larger ones have better ways.
const SMALL: u32 = 32 << 10;

/// Does what was admitted where that waits for nothing and is the common case: small reads of what is in memory, writes
/// to what lies in memory. Else gives the lease back. Costs no allocation but a buffer where
/// the tray is full.
pub(super) fn at_once(
    device: &dyn Device,
    admitted: Admitted,
    payload: &[u8],
    to: To,
    lease: Lease,
    tray: &mut Tray,
) -> Result<Reply, Lease> {
    match admitted {
        Admitted::Write { at, durability: Durability::Cached } if device.write_now(at, payload) => {
            Ok(Reply::done(to, lease))
        }
        Admitted::Read { at, len: len @ 1..=SMALL, .. } => {
            if to.style >= Style::Structured && !device.blank(at, len.into()).is_empty() {
                return Err(lease);
            }
            let len = len as usize;
            if tray.has_room(len) {
                return Reply::laid(to, at, len, lease, tray, |room| device.read_now(at, room));
            }
            let mut own = buffer(len);
            if !device.read_now(at, &mut own) {
                return Err(lease);
            }
            Ok(Reply::data(to, at, own.freeze(), lease))
        }
        _ => Err(lease),
    }
}

/// Does what was admitted. `payload` is what came with the request; `pipes`, what a read may leave in the kernel.
pub(super) async fn execute(
    device: Arc<dyn Device>,
    admitted: Admitted,
    payload: Bytes,
    to: To,
    mut lease: Lease,
    pipes: Option<Arc<Pipes>>,
) -> Reply {
    let outcome = match admitted {
        // Nothing to do is done; no device needs to think about it.
        Admitted::Read { len: 0, .. }
        | Admitted::Trim { len: 0, .. }
        | Admitted::Cache { len: 0, .. }
        | Admitted::WriteZeroes { len: 0, .. } => Ok(()),
        Admitted::Write { .. } if payload.is_empty() => Ok(()),
        Admitted::Read { at, len, whole } => {
            if to.style >= Style::Structured {
                let blank = device.blank(at, len.into());
                if !blank.is_empty()
                    && let Some(parts) = sparse_parts(at, len.into(), &blank, whole)
                {
                    // Boxed: rare, and every request would carry its size.
                    return Reply::pieces(to, Box::pin(read_parts(&*device, parts)).await, lease);
                }
            }
            // What has to wait for a disk is read: that leaves a slow member, and mends a bad one.
            if let Some(pipes) = &pipes
                && let Ok(Some(pieces)) = device.locate(at, len.into()).await
                && pieces.iter().all(Piece::is_resident)
            {
                match Reply::spliced(to, at, &pieces, pipes, lease) {
                    Ok(reply) => return reply,
                    Err(unused) => lease = unused,
                }
            }
            match read(&*device, at, len as usize).await {
                Ok(data) => return Reply::data(to, at, data, lease),
                Err(refusal) => Err(refusal),
            }
        }
        Admitted::Write { at, durability } => {
            settle(&*device, at, device.write(at, payload, durability).await)
        }
        Admitted::Flush => device.flush().await.map_err(|error| failed(&*device, &error)),
        Admitted::Trim { at, len, durability } => {
            let mut outcome = device.discard(at, len).await;
            if outcome.is_ok() && durability == Durability::Stable {
                outcome = device.flush().await;
            }
            settle(&*device, at, outcome)
        }
        Admitted::WriteZeroes { mode, fast: true, .. } if !device.zeroes_fast(mode) => {
            Err(Refusal::new(ErrorCode::NotSupported, "zeroing is no faster than writing here"))
        }
        Admitted::WriteZeroes { at, len, mode, durability, .. } => {
            settle(&*device, at, device.write_zeroes(at, len, mode, durability).await)
        }
        Admitted::Cache { at, len } => settle(&*device, at, device.prefetch(at, len).await),
        Admitted::Status { at, len, most } => return status(&*device, at, len, most, to, lease).await,
        Admitted::FilteredStatus { at, most } => match admit_filter(at, device.size(), &payload) {
            Ok(len) => return status(&*device, at, len, most, to, lease).await,
            Err(refusal) => Err(refusal),
        },
    };
    match outcome {
        Ok(()) => Reply::done(to, lease),
        Err(refusal) => Reply::refused(to, refusal, lease),
    }
}

async fn read(device: &dyn Device, at: u64, len: usize) -> Result<Bytes, Refusal> {
    match device.read(at, buffer(len)).await {
        // Fewer bytes than announced would shift everything after them.
        Ok(data) if data.len() != len => Err(Refusal::new(ErrorCode::Io, "a short read").at(at)),
        Ok(data) => Ok(data.freeze()),
        Err(error) => Err(failed(device, &error).at(at)),
    }
}

/// Cuts a range at its blank parts: each with whether it is blank. `None`: it is better read as it is. A read that must
/// stay whole is cut only if it is all blank.
fn sparse_parts(at: u64, len: u64, blank: &[Range<u64>], whole: bool) -> Option<Vec<(Range<u64>, bool)>> {
    if 2 * blank.len() + 1 > MAX_PARTS || whole && (blank.len() > 1 || blank[0] != (at..at + len)) {
        return None;
    }
    let mut parts = Vec::with_capacity(2 * blank.len() + 1);
    let mut next = at;
    for hole in blank {
        if hole.start > next {
            parts.push((next..hole.start, false));
        }
        parts.push((hole.clone(), true));
        next = hole.end;
    }
    if next < at + len {
        parts.push((next..at + len, false));
    }
    Some(parts)
}

async fn read_parts(device: &dyn Device, parts: Vec<(Range<u64>, bool)>) -> Vec<Found> {
    let reads = parts.into_iter().map(|(Range { start, end }, blank)| async move {
        let len = (end - start) as u32;
        if blank {
            return Found::Zeroes(start, len);
        }
        match read(device, start, len as usize).await {
            Ok(data) => Found::Data(start, data),
            Err(refusal) => Found::Failed(refusal),
        }
    });
    join_all(reads).await
}

async fn status(device: &dyn Device, at: u64, len: u64, most: usize, to: To, lease: Lease) -> Reply {
    let extents = match device.extents(at, len).await {
        Ok(extents) => extents,
        Err(error) => return Reply::refused(to, failed(device, &error).at(at), lease),
    };
    let told = extents.iter().take(most).map(|extent| Descriptor {
        length: extent.len,
        status: if extent.hole { STATE_HOLE | STATE_ZERO } else { 0 },
    });
    let mut told: Vec<_> = told.collect();
    if told.is_empty() {
        // There has to be one, and data is what nothing is known of.
        told.push(Descriptor { length: len, status: 0 });
    }
    Reply::status(to, told, lease)
}

fn settle(device: &dyn Device, at: u64, outcome: crate::Result<()>) -> Result<(), Refusal> {
    outcome.map_err(|error| failed(device, &error).at(at))
}

fn failed(device: &dyn Device, error: &Error) -> Refusal {
    tracing::warn!(device = device.name(), "NBD request failed: {error}");
    Refusal::from(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_cut_at_holes_unless_they_must_stay_whole() {
        let cut = |blank: &[Range<u64>], whole| sparse_parts(100, 100, blank, whole);
        let (middle, all) = (std::slice::from_ref(&(120..150)), std::slice::from_ref(&(100..200)));
        let expected = vec![(100..120, false), (120..150, true), (150..200, false)];
        assert_eq!(cut(middle, false), Some(expected));
        assert_eq!(cut(middle, true), None);
        assert_eq!(cut(all, true), Some(vec![(100..200, true)]));
        assert_eq!(cut(&[100..110, 190..200], false).unwrap().len(), 3);
        let many: Vec<_> = (0..40).map(|i| 100 + 2 * i..101 + 2 * i).collect();
        assert_eq!(cut(&many, false), None);
    }
}
