#![no_main]

#[path = "../../tests/src/nbd_fuzz.rs"]
#[allow(dead_code, reason = "each target drives one phase")]
mod nbd_fuzz;

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd_fuzz::replies(input));
