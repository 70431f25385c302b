//! Arrays on image files, and what becomes of all their copies: looked at past the engine. One program, so that its parts
//! share how arrays are made and started ([`images`]).

// A test fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

mod images;
mod odd;

mod copies;
mod extents;
mod grow;
mod order;
mod scrub;
