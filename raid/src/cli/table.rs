//! Tables for people: small, without a frame, so that they also read well in a log.

use comfy_table::{CellAlignment, Table, presets};

/// `name  value` lines.
pub(super) fn facts<'a>(facts: impl IntoIterator<Item = (&'a str, String)>) -> Table {
    let mut table = bare();
    for (name, value) in facts {
        table.add_row([name.to_owned(), value]);
    }
    table
}

/// A table with a header line; the columns in `numbers` are aligned to the right.
pub(super) fn list<const N: usize>(header: [&str; N], numbers: &[usize]) -> Table {
    let mut table = bare();
    table.set_header(header);
    for number in numbers {
        if let Some(column) = table.column_mut(*number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The table's text without blanks at the ends of lines.
pub(super) fn text(table: &Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

fn bare() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}
