//! What a session can do: exports, their names and flags, and what a handshake settles.

use super::super::wire::{Style, transmission_flags};
use crate::device::Device;
use std::sync::Arc;

/// A device under a name.
#[derive(Clone)]
pub struct Export {
    /// Its name, at most 4096 bytes.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn Device>,
    /// Refuse every change.
    pub read_only: bool,
}

impl Export {
    /// What this export can do in such a session, as the protocol's flags. `FLUSH` and `FUA` of a device cover the
    /// writes of all its users, hence `CAN_MULTI_CONN`.
    #[must_use]
    pub fn transmission_flags(&self, style: Style, allocation: bool) -> u16 {
        use transmission_flags as f;
        let mut flags = f::HAS_FLAGS | f::SEND_FLUSH | f::CAN_MULTI_CONN | f::SEND_CACHE;
        flags |= if self.read_only {
            f::READ_ONLY
        } else {
            f::SEND_FUA | f::SEND_TRIM | f::SEND_WRITE_ZEROES | f::SEND_FAST_ZERO
        };
        for (holds, flag) in [
            (self.device.is_rotational(), f::ROTATIONAL),
            (style >= Style::Structured, f::SEND_DF),
            (style == Style::Extended && allocation, f::BLOCK_STATUS_PAYLOAD),
        ] {
            if holds {
                flags |= flag;
            }
        }
        flags
    }
}

/// What a handshake has settled.
#[derive(Clone)]
pub struct Session {
    /// What is served.
    pub export: Arc<Export>,
    /// How requests and replies are framed.
    pub style: Style,
    /// Whether `base:allocation` was chosen: `BLOCK_STATUS` may be asked for.
    pub allocation: bool,
}

/// Whether TLS can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// There is none.
    Off,
    /// A client may start it.
    Offered,
    /// Without it nothing is served or told.
    Required,
    /// The session is under it.
    Started,
}

/// What a server offers: the first export also answers to the empty name.
#[derive(Clone)]
pub struct Exports(Vec<Arc<Export>>);

impl Exports {
    /// One export, under its own name and as the default.
    #[must_use]
    pub fn single(export: Export) -> Self {
        Self(vec![Arc::new(export)])
    }

    pub(super) fn find(&self, name: &str) -> Option<&Arc<Export>> {
        if name.is_empty() { self.0.first() } else { self.0.iter().find(|export| export.name == name) }
    }

    /// Every name that can be asked for and what it leads to, the default one first.
    pub(super) fn names(&self) -> impl Iterator<Item = (&str, &Export)> {
        let named = self.0.iter().map(|export| (export.name.as_str(), &**export));
        let default = self.0.first().map(|export| ("", &**export));
        default.into_iter().chain(named.filter(|(name, _)| !name.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Sized, exports};
    use super::*;

    #[test]
    fn flags_follow_what_was_settled() {
        use transmission_flags as f;
        let export = exports().find("").cloned().unwrap();
        let df = |style| export.transmission_flags(style, true) & (f::SEND_DF | f::BLOCK_STATUS_PAYLOAD);
        assert_eq!(df(Style::Simple), 0);
        assert_eq!(df(Style::Structured), f::SEND_DF);
        assert_eq!(df(Style::Extended), f::SEND_DF | f::BLOCK_STATUS_PAYLOAD);
        assert_eq!(export.transmission_flags(Style::Extended, false) & f::BLOCK_STATUS_PAYLOAD, 0);
    }

    #[test]
    fn a_read_only_export_says_so() {
        let device = Arc::new(Sized(1));
        let export = Export { name: String::new(), description: String::new(), device, read_only: true };
        let flags = export.transmission_flags(Style::Simple, false);
        assert_ne!(flags & transmission_flags::READ_ONLY, 0);
        assert_eq!(flags & transmission_flags::SEND_TRIM, 0);
        assert_eq!(flags & (transmission_flags::SEND_DF | transmission_flags::SEND_FAST_ZERO), 0);
        assert_eq!(Exports::single(export).names().map(|(name, _)| name).collect::<Vec<_>>(), [""]);
    }
}
