//! The map of a zoo for a terminal: a line for each row, a character for each block, kin under one ruler, wide chains folded.

use std::fmt::Write;

use super::{Kin, Report, Row};

/// How the map is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Columns of the terminal.
    pub columns: usize,
    /// Whether it shows colours and Unicode's block elements; plain letters else.
    pub colours: bool,
    /// Rows to draw at most.
    pub rows_max: usize,
}

/// Fewest places of a chain that lie beside a name, however narrow the terminal.
const PLACES_MIN: usize = 10;
/// Colours of blocks that several models have, by rank, out of the 256 of terminals.
const SHARED_COLOURS: [u8; 5] = [67, 72, 139, 179, 109];
/// Colour of a block that one model has.
const OWN_COLOUR: u8 = 173;
/// Eighths of a cell, from the bottom.
const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Draws the map.
pub fn map(report: &Report, look: &Look) -> String {
    let mut out = String::new();
    let mut rows_left = look.rows_max;
    let mut rows_left_out = 0;
    let (several, single): (Vec<&Kin>, Vec<&Kin>) = report.kin.iter().partition(|kin| kin.model_count > 1);
    let sections = several.into_iter().map(|kin| (format!("{} models that share weights", kin.model_count), kin.rows.iter().collect()));
    let alone: Vec<&Row> = single.iter().flat_map(|kin| &kin.rows).collect();
    let title =
        if alone.len() == 1 { "a model that shares nothing".to_owned() } else { format!("{} models that share nothing", alone.len()) };
    let alone = (!alone.is_empty()).then_some((title, alone));
    for (title, rows) in sections.chain(alone) {
        let drawn = rows.len().min(rows_left);
        (rows_left, rows_left_out) = (rows_left - drawn, rows_left_out + rows.len() - drawn);
        if drawn > 0 {
            write(&mut out, format_args!("{title}\n"));
            bands(&mut out, report, &rows[..drawn], look);
            out.push('\n');
        }
    }
    if rows_left_out > 0 {
        write(&mut out, format_args!("{rows_left_out} more rows are left out: --rows {} shows all\n\n", look.rows_max + rows_left_out));
    }
    out + &legend(look)
}

/// The rows of a section, one band of places under the other.
fn bands(out: &mut String, report: &Report, rows: &[&Row], look: &Look) {
    let labels: Vec<String> = rows.iter().map(|row| label(report, row)).collect();
    let widest = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
    let label_columns = widest.min((look.columns / 2).max(12));
    let places = look.columns.saturating_sub(label_columns + 2).max(PLACES_MIN);
    let places = if places >= 20 { places / 10 * 10 } else { places };
    let longest = rows.iter().map(|row| row.blocks.len()).max().unwrap_or(0);
    for from in (0..longest).step_by(places) {
        let to = (from + places).min(longest);
        write(out, format_args!("{:label_columns$}  {}\n", "", ruler(from, to)));
        for (row, label) in std::iter::zip(rows, &labels) {
            if row.blocks.len() <= from {
                continue;
            }
            let cells: String = (from..to.min(row.blocks.len())).map(|place| cell(report, row, place, look)).collect();
            write(out, format_args!("{:label_columns$}  {cells}\n", fitted(label, label_columns)));
        }
    }
}

/// The first model of a row, and how many more are like it.
fn label(report: &Report, row: &Row) -> String {
    let first = &report.models[row.models[0]].model;
    match row.models.len() {
        1 => first.clone(),
        count => format!("{first} + {}", count - 1),
    }
}

/// A text in so many columns; where it is cut, two dots stand for the middle, since names differ at their ends.
fn fitted(text: &str, columns: usize) -> String {
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= columns {
        return text.to_owned();
    }
    let (front, back) = ((columns - 2) / 2, (columns - 2).div_ceil(2));
    let (front, back): (String, String) = (letters[..front].iter().collect(), letters[letters.len() - back..].iter().collect());
    format!("{front}..{back}")
}

/// Every tenth place by its number, where that fits.
fn ruler(from: usize, to: usize) -> String {
    let mut line = String::new();
    for place in from..to {
        if place % 10 == 0 {
            while line.len() < place - from {
                line.push(' ');
            }
            write(&mut line, format_args!("{place}"));
        }
    }
    line
}

fn cell(report: &Report, row: &Row, place: usize, look: &Look) -> String {
    let block = &report.blocks[row.blocks[place]];
    let is_adapted = row.adapters.contains_key(&place);
    let is_shared = block.model_count > 1;
    if !look.colours {
        let letter = (b'A' + row.ranks[place].min(25) as u8) as char;
        let letter = match (is_shared, is_adapted) {
            (true, false) => letter,
            (true, true) => letter.to_ascii_lowercase(),
            (false, true) => '+',
            (false, false) if block.common_bytes * 2 > block.bytes => '=',
            (false, false) => '#',
        };
        return letter.to_string();
    }
    let colour = if is_shared { SHARED_COLOURS[row.ranks[place] % SHARED_COLOURS.len()] } else { OWN_COLOUR };
    if is_adapted {
        return format!("\x1b[48;5;{colour}m\x1b[38;5;231m+\x1b[0m");
    }
    // Of a block that nobody else has, the part that others have too is drawn in their colour, from the bottom.
    let eighths = if is_shared || block.bytes == 0 { 0 } else { (block.common_bytes as u128 * 8).div_ceil(block.bytes.into()) };
    match (eighths as usize).min(7) {
        0 => format!("\x1b[38;5;{colour}m█\x1b[0m"),
        eighths => format!("\x1b[48;5;{colour}m\x1b[38;5;{}m{}\x1b[0m", SHARED_COLOURS[0], EIGHTHS[eighths]),
    }
}

fn legend(look: &Look) -> String {
    let order = "Places: embed, then attention and feed_forward by turns (a stitch between two models' layers is a place too), head last. \
                 Equal signs in one column are the same block.";
    if !look.colours {
        return format!(
            "{order}\nA B C..: a block that several models have, the most common first; lower case: with an adapter over it.\n\
             #: a block of its own; =: of its own, but for most of its bytes; +: of its own, with an adapter over it.\n"
        );
    }
    let sign = |colour: u8| format!("\x1b[38;5;{colour}m█\x1b[0m");
    let shared: String = SHARED_COLOURS.iter().map(|colour| sign(*colour)).collect();
    let partly = format!("\x1b[48;5;{OWN_COLOUR}m\x1b[38;5;{}m▅\x1b[0m", SHARED_COLOURS[0]);
    format!(
        "{order}\n{shared} several models have it, the most common first   {} of its own   {partly} partly   + with an adapter over it\n",
        sign(OWN_COLOUR)
    )
}

fn write(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to a String");
}
