//! Clients of a block device, judged by the model as they go.
//!
//! Each client does one operation after the other; several run at once. What they ask and what they are told goes
//! into [`Registers`]; what does not fit is kept as the first [`Violation`], and ends the run.

use super::registers::{Registers, Violation, payload};
use super::rng::Rng;
use super::seeds::tracing;
use super::surface::SECTOR;
use bytes::BytesMut;
use futures_util::future::join_all;
use parking_lot::Mutex;
use raid::device::{Device, Durability, ZeroMode};
use raid::error::Error;
use raid::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;

/// The model shared by all clients of a device, over all boots of the machine.
pub struct Witness {
    state: Mutex<State>,
}

struct State {
    registers: Registers,
    next_write: u64,
    violation: Option<Violation>,
    errors_excused: bool,
}

/// One operation of a client. Positions and lengths in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Write a fresh payload.
    Write(u64, u64),
    /// The same, durable when it is answered.
    WriteStable(u64, u64),
    /// Zero a range; stable or not.
    Zero(u64, u64, bool),
    /// Give a range back.
    Discard(u64, u64),
    /// Read a range.
    Read(u64, u64),
    /// Flush.
    Flush,
}

impl Step {
    fn sector(self) -> u64 {
        match self {
            Self::Write(at, _)
            | Self::WriteStable(at, _)
            | Self::Zero(at, _, _)
            | Self::Discard(at, _)
            | Self::Read(at, _) => at,
            Self::Flush => 0,
        }
    }
}

/// How random clients behave.
#[derive(Debug, Clone)]
pub struct Workload {
    /// How many at once.
    pub clients: usize,
    /// Operations each.
    pub operations: u64,
    /// Longest operation, in sectors.
    pub longest: u64,
    /// Clients keep to this many sectors, so that they meet.
    pub span: u64,
}

impl Witness {
    /// Watches a device of `sectors` zeroed sectors; `torn` as in [`Registers::zeroed`].
    #[must_use]
    pub fn new(sectors: u64, torn: bool) -> Arc<Self> {
        let registers = Registers::zeroed(sectors, torn);
        let state = State { registers, next_write: 1, violation: None, errors_excused: false };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// A witness of what may become of the device from here on, apart from this one.
    #[must_use]
    pub fn fork(&self) -> Arc<Self> {
        let State { registers, next_write, violation, errors_excused } = &*self.state.lock();
        let state = State {
            registers: registers.clone(),
            next_write: *next_write,
            violation: violation.clone(),
            errors_excused: *errors_excused,
        };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// From now on failed operations are no violation (the disks were made too bad), or are again.
    pub fn excuse_errors(&self, excused: bool) {
        self.state.lock().errors_excused = excused;
    }

    /// The power went.
    pub fn power_cut(&self) {
        self.state.lock().registers.power_cut();
    }

    /// The process was killed.
    pub fn process_killed(&self) {
        self.state.lock().registers.process_killed();
    }

    /// What a power cut now would permit of later reads; see [`Registers::digest_after_cut`].
    #[must_use]
    pub fn digest_after_cut(&self) -> u64 {
        self.state.lock().registers.digest_after_cut()
    }

    /// The first thing the device did wrong.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        self.state.lock().violation.clone()
    }

    /// Panics if the device did anything wrong.
    pub fn judge(&self) {
        if let Some(violation) = self.violation() {
            panic!("{violation}");
        }
    }

    fn note(&self, outcome: Result<(), Violation>) {
        if let Err(violation) = outcome {
            self.state.lock().violation.get_or_insert(violation);
        }
    }

    /// Does one step and waits for its answer; whether the device said it went well.
    pub async fn step(&self, device: &dyn Device, step: Step) -> bool {
        if tracing() {
            eprintln!("client: {step:?} (the next payload is {})", self.state.lock().next_write);
        }
        let outcome = self.take(device, step).await;
        if tracing() {
            eprintln!("client: {step:?}: {outcome:?}");
        }
        let Err(error) = outcome else { return true };
        let mut state = self.state.lock();
        if !state.errors_excused && !matches!(step, Step::Read(..)) {
            let what = format!("{step:?} failed: {error}");
            let permitted = "success: enough of the disks are good".to_owned();
            state.violation.get_or_insert(Violation { sector: step.sector(), what, permitted });
        }
        false
    }

    async fn take(&self, device: &dyn Device, step: Step) -> Result<(), Error> {
        match step {
            Step::Write(at, len) => self.write(device, at, len, Durability::Cached).await,
            Step::WriteStable(at, len) => self.write(device, at, len, Durability::Stable).await,
            Step::Zero(at, len, stable) => {
                let zeroes = BytesMut::zeroed((len * SECTOR) as usize).freeze();
                let token = self.state.lock().registers.begin_write(at, &zeroes);
                let durability = if stable { Durability::Stable } else { Durability::Cached };
                let mode = if at % 2 == 0 { ZeroMode::MayPunch } else { ZeroMode::Allocate };
                let outcome = device.write_zeroes(at * SECTOR, len * SECTOR, mode, durability).await;
                self.state.lock().registers.end_write(&token, outcome.is_ok(), stable);
                outcome
            }
            Step::Discard(at, len) => {
                let token = self.state.lock().registers.begin_discard(at..at + len);
                let outcome = device.discard(at * SECTOR, len * SECTOR).await;
                self.state.lock().registers.end_write(&token, outcome.is_ok(), false);
                outcome
            }
            Step::Read(at, len) => self.read(device, at, len).await,
            Step::Flush => {
                let token = self.state.lock().registers.begin_flush();
                let outcome = device.flush().await;
                self.state.lock().registers.end_flush(&token, outcome.is_ok());
                outcome
            }
        }
    }

    async fn write(
        &self,
        device: &dyn Device,
        at: u64,
        len: u64,
        durability: Durability,
    ) -> Result<(), Error> {
        let (token, data) = {
            let mut state = self.state.lock();
            let data = payload(state.next_write, at, len);
            state.next_write += 1;
            (state.registers.begin_write(at, &data), data)
        };
        // As the server does.
        let outcome = if durability == Durability::Cached && device.write_now(at * SECTOR, &data) {
            Ok(())
        } else {
            device.write(at * SECTOR, data, durability).await
        };
        self.state.lock().registers.end_write(&token, outcome.is_ok(), durability == Durability::Stable);
        outcome
    }

    async fn read(&self, device: &dyn Device, at: u64, len: u64) -> Result<(), Error> {
        let token = self.state.lock().registers.begin_read(at..at + len);
        let mut buf = BytesMut::zeroed((len * SECTOR) as usize);
        let answer = if device.read_now(at * SECTOR, &mut buf) {
            Ok(buf)
        } else {
            device.read(at * SECTOR, buf).await
        };
        let mut state = self.state.lock();
        let excused = state.errors_excused;
        let outcome = match &answer {
            Ok(bytes) => state.registers.end_read(&token, bytes),
            Err(error) => state.registers.fail_read(&token, &error.to_string(), excused),
        };
        drop(state);
        self.note(outcome);
        answer.map(drop)
    }

    /// Reads the whole device, piece by piece.
    pub async fn read_all(&self, device: &dyn Device) {
        let sectors = self.state.lock().registers.sectors();
        let mut at = 0;
        while at < sectors {
            let len = (sectors - at).min(16);
            if !self.step(device, Step::Read(at, len)).await {
                // One bad sector must not hide its neighbours.
                for one in at..at + len {
                    self.step(device, Step::Read(one, 1)).await;
                }
            }
            at += len;
        }
    }

    /// Runs random clients at once until each has done its part, or one has seen a violation.
    pub async fn run(
        self: &Arc<Self>,
        device: &Arc<dyn Device>,
        runtime: &Arc<dyn Runtime>,
        rng: &mut Rng,
        load: &Workload,
    ) {
        let mut ends = Vec::new();
        for _ in 0..load.clients {
            let (witness, device, clock) = (Arc::clone(self), Arc::clone(device), Arc::clone(runtime));
            let (mut rng, load) = (rng.fork(), load.clone());
            let (tell, end) = tokio::sync::oneshot::channel::<()>();
            runtime.spawn(Box::pin(async move {
                for _ in 0..load.operations {
                    if witness.violation().is_some() {
                        break;
                    }
                    if rng.one_in(1, 4) {
                        clock.sleep(Duration::from_micros(rng.below(20_000))).await;
                    }
                    let step = random_step(&mut rng, &load);
                    witness.step(&*device, step).await;
                }
                drop(tell);
            }));
            ends.push(end);
        }
        join_all(ends).await;
    }
}

fn random_step(rng: &mut Rng, load: &Workload) -> Step {
    let at = rng.below(load.span);
    let len = rng.within(1..load.longest.min(load.span - at) + 1);
    match rng.below(20) {
        0..8 => Step::Write(at, len),
        8..10 => Step::WriteStable(at, len),
        10 => Step::Zero(at, len, false),
        11 => Step::Zero(at, len, true),
        12 => Step::Discard(at, len),
        13..15 => Step::Flush,
        _ => Step::Read(at, len),
    }
}
