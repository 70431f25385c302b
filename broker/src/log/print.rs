//! Two forms of output behind one [`Printer`]: Kafka's text, and one JSON document that is written as it comes, so that a
//! large store is never held in memory.

use serde::Serialize;
use std::io::{self, BufWriter, StdoutLock, Write};

/// Writes entries under the file that they stand in.
pub(super) struct Printer {
    out: BufWriter<StdoutLock<'static>>,
    json: bool,
    files: usize,
    entries: usize,
}

impl Printer {
    pub(super) fn new(json: bool) -> io::Result<Self> {
        let mut printer = Self { out: BufWriter::new(io::stdout().lock()), json, files: 0, entries: 0 };
        if json {
            printer.out.write_all(b"[")?;
        }
        Ok(printer)
    }

    /// Begins a file; `base` is a segment's first offset.
    pub(super) fn begin(&mut self, file: &str, kind: &str, base: Option<i64>) -> io::Result<()> {
        self.entries = 0;
        self.files += 1;
        if !self.json {
            writeln!(self.out, "Dumping {file}")?;
            return base.map_or(Ok(()), |base| writeln!(self.out, "Log starting offset: {base}"));
        }
        if self.files > 1 {
            self.out.write_all(b",\n")?;
        }
        write!(self.out, "{{\"file\":{},\"kind\":\"{kind}\"", serde_json::Value::from(file))?;
        if let Some(base) = base {
            write!(self.out, ",\"startingOffset\":{base}")?;
        }
        self.out.write_all(b",\"entries\":[")
    }

    /// An entry, in both forms.
    pub(super) fn entry(&mut self, value: &impl Serialize, text: impl FnOnce() -> String) -> io::Result<()> {
        self.entries += 1;
        if !self.json {
            return writeln!(self.out, "{}", text());
        }
        self.out.write_all(if self.entries > 1 { b",\n" } else { b"\n" })?;
        serde_json::to_writer(&mut self.out, value)?;
        Ok(())
    }

    /// Ends a file; `fault` says what is wrong with the whole of it.
    pub(super) fn end(&mut self, fault: Option<&str>) -> io::Result<()> {
        match (self.json, fault) {
            (false, Some(fault)) => writeln!(self.out, "  fault: {fault}"),
            (false, None) => Ok(()),
            (true, fault) => {
                self.out.write_all(b"]")?;
                if let Some(fault) = fault {
                    write!(self.out, ",\"fault\":{}", serde_json::Value::from(fault))?;
                }
                self.out.write_all(b"}")
            }
        }
    }

    /// Ends the whole.
    pub(super) fn finish(mut self) -> io::Result<()> {
        if self.json {
            self.out.write_all(b"]\n")?;
        }
        self.out.flush()
    }
}
