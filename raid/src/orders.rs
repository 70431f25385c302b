//! What a live volume can be told, and what it says to it: values only, shared by the engine, the control socket and the
//! command line.

use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

/// A member as a person names it: all digits are a slot, anything else is the path it was opened at.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberName {
    /// The member of that slot.
    Slot(usize),
    /// The member whose device has that name.
    Path(String),
}

impl FromStr for MemberName {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        // A number that no slot can have names nothing: as a path it is refused by name.
        let slot = if digits { text.parse().ok() } else { None };
        Ok(slot.map_or_else(|| Self::Path(text.to_owned()), Self::Slot))
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot(slot) => write!(f, "slot {slot}"),
            Self::Path(path) => f.write_str(path),
        }
    }
}

/// What became of a device that was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Added {
    /// It fills that slot and is being rebuilt from the start.
    Rebuilding(usize),
    /// It was known: in that slot, only what it missed is copied.
    Readded(usize),
    /// No slot is free: it waits as a spare.
    Spare,
}

/// How fast members are made equal, in bytes a second (md: `speed_limit_min`, `speed_limit_max`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpeedLimits {
    /// Kept up even while clients use the volume.
    pub min: u64,
    /// Never exceeded.
    pub max: u64,
}

impl SpeedLimits {
    /// Limits that some speed keeps.
    pub fn new(min: u64, max: u64) -> crate::Result<Self> {
        if min > max || max == 0 {
            return Err(crate::Error::SpeedLimits { min, max });
        }
        Ok(Self { min, max })
    }

    /// 1 MiB/s under load, as fast as it goes without.
    #[must_use]
    pub const fn standard() -> Self {
        Self { min: 1 << 20, max: u64::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_name_a_slot_and_all_else_a_path() {
        let name = |text: &str| text.parse::<MemberName>().unwrap();
        assert_eq!(name("0"), MemberName::Slot(0));
        assert_eq!(name("12"), MemberName::Slot(12));
        for path in ["", "./0", "disk0.img", "-1", "99999999999999999999999"] {
            assert_eq!(name(path), MemberName::Path(path.to_owned()));
        }
    }
}
