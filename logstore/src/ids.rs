//! Ids of stores, clusters and topics: made at random, printed as Kafka prints them.

use raid::runtime::Runtime;
use uuid::Uuid;

/// A new random id. As Kafka's own, it never begins with a dash when it is printed: whoever passes it to a command means no
/// option by it.
pub(crate) fn fresh(runtime: &dyn Runtime) -> Uuid {
    let mut bytes = [0; 16];
    runtime.fill_random(&mut bytes);
    // The first digit stands for the first six bits.
    if bytes[0] >> 2 == DASH {
        bytes[0] ^= 0x80;
    }
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
/// What the dash stands for.
const DASH: u8 = 62;

/// An id as Kafka prints it: base64 for URLs, without padding, 22 characters.
#[must_use]
pub(crate) fn base64(id: Uuid) -> String {
    // 128 bits in 22 digits of 6: four zero bits follow.
    (0..22)
        .map(|digit| {
            let shift = 122 - digit * 6;
            let value = if shift >= 0 { id.as_u128() >> shift } else { id.as_u128() << -shift };
            DIGITS[(value & 63) as usize] as char
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use raid::runtime::BoxFuture;
    use std::time::Duration;

    #[test]
    fn ids_print_as_kafka_prints_them() {
        // From `org.apache.kafka.common.Uuid`: ONE_UUID, and the largest.
        assert_eq!(base64(Uuid::from_u128(1)), "AAAAAAAAAAAAAAAAAAAAAQ");
        assert_eq!(base64(Uuid::from_u128(u128::MAX)), "_____________________w");
    }

    /// Chance, whose dice all show this.
    #[derive(Debug)]
    struct Loaded(u8);

    impl Runtime for Loaded {
        fn now(&self) -> Duration {
            Duration::ZERO
        }
        fn wall_clock(&self) -> Duration {
            Duration::ZERO
        }
        fn fill_random(&self, out: &mut [u8]) {
            out.fill(self.0);
        }
        fn spawn(&self, _: BoxFuture<'static, ()>) {
            panic!("an id needs no task");
        }
        fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
            panic!("an id needs no time");
        }
    }

    #[test]
    fn no_id_looks_like_an_option() {
        let made: Vec<String> = (0..=255).map(|byte| base64(fresh(&Loaded(byte)))).collect();
        assert_eq!(made.iter().find(|id| id.starts_with('-')), None);
        // The others are left as chance gave them.
        assert!(made[0].starts_with('A') && made[255].starts_with('_') && made[0xf7].starts_with('9'));
    }
}
