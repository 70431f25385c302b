//! Sizes as people write them: digits, then K, M, G or T for powers of 1024. And back, for people.

/// Bytes of a size such as `4G` or `512K`; more than zero.
///
/// An error is a sentence for the person who typed it.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size; write digits and then K, M, G or T, such as 4G");
    let (digits, shift) = match text.chars().last().map(|unit| unit.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    match number.checked_mul(1 << shift) {
        // The kernel's file offsets are signed.
        Some(bytes) if bytes > 0 && i64::try_from(bytes).is_ok() => Ok(bytes),
        Some(0) => Err("a size must be more than zero".to_owned()),
        _ => Err(format!("`{text}` is more than a file can hold")),
    }
}

/// A size as an upper limit: `none` for no limit.
pub(super) fn parse_limit(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(u64::MAX) } else { parse(text) }
}

/// Bytes for people: exact where that is short, else with one decimal.
#[must_use]
pub fn show(bytes: u64) -> String {
    let (mut unit, mut scale) = ("B", 1u64);
    for (name, shift) in [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)] {
        if bytes >> shift > 0 {
            (unit, scale) = (name, 1 << shift);
        }
    }
    if bytes.is_multiple_of(scale) {
        format!("{} {unit}", bytes / scale)
    } else {
        format!("{:.1} {unit}", bytes as f64 / scale as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("512K"), Ok(512 << 10));
        assert_eq!(parse("64m"), Ok(64 << 20));
        assert_eq!(parse("4G"), Ok(4 << 30));
        assert_eq!(parse("2T"), Ok(2 << 40));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "K",
            "0",
            "0G",
            "-1",
            "+1",
            "1.5G",
            "4GB",
            "4 G",
            "ten",
            "9999999T",
            "99999999999999999999",
            "1é",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shown_as_people_read_it() {
        assert_eq!(show(0), "0 B");
        assert_eq!(show(512), "512 B");
        assert_eq!(show(512 << 10), "512 KiB");
        assert_eq!(show((4 << 30) - (2 << 20)), "4.0 GiB");
        assert_eq!(show(3 << 29), "1.5 GiB");
        assert_eq!(show(u64::MAX), "16777216.0 TiB");
    }
}
