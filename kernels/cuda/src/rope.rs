//! Cosines and sines of positions. They come from the contract's libm (docs/numerics.md, rule 5) and so from the host, which computes those of a page of
//! positions once; the card keeps them, and a step takes rows of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::driver::{Address, Driver, DriverError};
use crate::memory::Memory;

/// Positions of a page: few enough that a step does not notice the one that computes it.
const PAGE_POSITIONS: u32 = 256;
/// Tables that are kept: more than any chain has kinds of rotation.
const TABLES_MAX: usize = 16;

/// Rows `[2 * half]` of one rotation: cosines, then sines, both times the attention factor.
struct Table {
    frequencies: Vec<f32>,
    attention_factor: f32,
    pages: BTreeMap<u32, Memory>,
}

/// All rotations' rows, the latest used last.
#[derive(Default)]
pub(crate) struct Ropes {
    tables: Vec<Table>,
}

/// The row of a position.
pub(crate) fn row_into(out: &mut Vec<u8>, position: u32, frequencies: &[f32], attention_factor: f32) {
    let angle = |frequency: &f32| f64::from(position as f32 * frequency);
    out.extend(frequencies.iter().flat_map(|frequency| (libm::cos(angle(frequency)) as f32 * attention_factor).to_le_bytes()));
    out.extend(frequencies.iter().flat_map(|frequency| (libm::sin(angle(frequency)) as f32 * attention_factor).to_le_bytes()));
}

impl Ropes {
    /// Where the card has the row of each position.
    ///
    /// # Errors
    /// When the card has no memory for a page, or fails.
    pub(crate) fn rows(
        &mut self,
        driver: &Arc<dyn Driver>,
        positions: &[u32],
        frequencies: &[f32],
        attention_factor: f32,
    ) -> Result<Vec<Address>, DriverError> {
        let same = |table: &Table| {
            let bits = |value: &f32| value.to_bits();
            bits(&table.attention_factor) == bits(&attention_factor) && table.frequencies.iter().map(bits).eq(frequencies.iter().map(bits))
        };
        let mut table = match self.tables.iter().position(same) {
            Some(place) => self.tables.remove(place),
            None => Table { frequencies: frequencies.to_vec(), attention_factor, pages: BTreeMap::new() },
        };
        let rows = positions.iter().map(|position| table.row(driver, *position)).collect();
        if self.tables.len() == TABLES_MAX {
            self.tables.remove(0);
        }
        self.tables.push(table);
        rows
    }
}

impl Table {
    fn row(&mut self, driver: &Arc<dyn Driver>, position: u32) -> Result<Address, DriverError> {
        let (page, row_bytes) = (position / PAGE_POSITIONS, 2 * self.frequencies.len() * size_of::<f32>());
        if !self.pages.contains_key(&page) {
            let first = page * PAGE_POSITIONS;
            let mut rows = Vec::with_capacity(PAGE_POSITIONS as usize * row_bytes);
            (0..PAGE_POSITIONS).for_each(|i| row_into(&mut rows, first.saturating_add(i), &self.frequencies, self.attention_factor));
            self.pages.insert(page, Memory::holding(driver, &rows)?);
        }
        Ok(self.pages[&page].at((position % PAGE_POSITIONS) as usize * row_bytes, row_bytes))
    }
}
