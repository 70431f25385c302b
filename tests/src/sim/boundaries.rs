//! The same life again and again, the power going one I/O boundary later each time.

use super::{CutStyle, Sim};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Cuts the power at every boundary of a life, in each style, until the life ends before its boundary comes; that must
/// take more than `least` of them. `make` makes the world of a life, `sim` is its machine, `live` lives it to the end or to
/// the cut and tells which, `judge` looks at what is left (and is told whether that was a whole life).
pub fn at_every_boundary<W>(
    least: u64,
    make: impl Fn(u64) -> W,
    sim: impl Fn(&W) -> &Sim,
    live: impl Fn(&W) -> bool,
    judge: impl Fn(&W, CutStyle, bool),
) {
    for style in [CutStyle::AllLost, CutStyle::ProcessKilled, CutStyle::Chance] {
        for k in 1.. {
            let world = make(k);
            sim(&world).set_cut_style(style);
            sim(&world).cut_after(Some(k));
            let whole = live(&world);
            if whole {
                sim(&world).cut_now();
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| judge(&world, style, whole))) {
                eprintln!("{style:?} at boundary {k}");
                resume_unwind(panic);
            }
            if whole {
                println!("{style:?}: {k} boundaries");
                assert!(k > least, "hardly anything was tried");
                break;
            }
        }
    }
}
