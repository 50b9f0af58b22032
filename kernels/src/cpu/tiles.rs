//! Which query rows walk the pages together: a pure function of queries and page tables, without effect on any bit.
//! Rows of one sequence share all pages before their own; rows of several sequences share those of a common prefix.

use super::attention::seen;
use crate::ops::Query;

/// Rows in an order in which those that read the same pages are neighbours, cut into tiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tiles {
    rows: Vec<u32>,
    /// One past the last row of each tile.
    ends: Vec<usize>,
}

/// Consecutive rows of one sequence.
struct Stretch<'a> {
    first_row: usize,
    row_count: usize,
    /// Page of the first position that the first row sees.
    first_page: usize,
    /// Slots from there to the page of the last position.
    slots: &'a [u32],
}

impl Tiles {
    /// Tiles of at most `rows_max` rows. Rows share a tile if they are of one sequence or begin with the same page.
    pub(super) fn new(queries: &[Query], tables: &[u32], page_tokens: usize, window: Option<u32>, rows_max: usize) -> Self {
        assert!(rows_max > 0, "a tile has rows");
        let mut stretches = Vec::new();
        for rows in queries.chunk_by(|a, b| a.table_start == b.table_start) {
            let first_row = stretches.last().map_or(0, |last: &Stretch<'_>| last.first_row + last.row_count);
            let first_page = seen(rows[0], window).start / page_tokens;
            let last_page = rows.iter().map(|query| query.position as usize / page_tokens).max().expect("a stretch has rows");
            // Positions of a stretch need not ascend.
            let first_page = first_page.min(last_page);
            let slots = &tables[rows[0].table_start as usize..][first_page..=last_page];
            stretches.push(Stretch { first_row, row_count: rows.len(), first_page, slots });
        }
        // Sequences with a long common prefix become neighbours; equal ones keep their order.
        stretches.sort_by(|a, b| (a.first_page, a.slots).cmp(&(b.first_page, b.slots)));

        let (mut rows, mut ends): (Vec<u32>, Vec<usize>) = (Vec::with_capacity(queries.len()), Vec::new());
        let mut begin = 0;
        for (i, stretch) in stretches.iter().enumerate() {
            let shares = i > 0 && {
                let before = &stretches[i - 1];
                (before.first_page, before.slots[0]) == (stretch.first_page, stretch.slots[0])
            };
            for k in 0..stretch.row_count {
                let joins = k > 0 || shares;
                if rows.len() > begin && (!joins || rows.len() - begin == rows_max) {
                    begin = rows.len();
                    ends.push(begin);
                }
                rows.push((stretch.first_row + k) as u32);
            }
        }
        if rows.len() > begin {
            ends.push(rows.len());
        }
        Self { rows, ends }
    }

    pub(super) fn count(&self) -> usize {
        self.ends.len()
    }

    /// Rows of one tile.
    pub(super) fn rows(&self, tile: usize) -> &[u32] {
        let start = if tile == 0 { 0 } else { self.ends[tile - 1] };
        &self.rows[start..self.ends[tile]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tiles of one row for each (table, position), over pages of 16.
    fn check(sequences: &[(&[u32], &[u32])], window: Option<u32>, rows_max: usize, expected: &[&[u32]]) {
        let (mut tables, mut queries) = (Vec::new(), Vec::new());
        for (table, positions) in sequences {
            queries.extend(positions.iter().map(|&position| Query { table_start: tables.len() as u32, position }));
            tables.extend_from_slice(table);
        }
        let tiles = Tiles::new(&queries, &tables, 16, window, rows_max);
        let got: Vec<&[u32]> = (0..tiles.count()).map(|tile| tiles.rows(tile)).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn a_chunk_is_cut_at_the_greatest_height() {
        check(&[(&[7, 3], &[14, 15, 16, 17, 18])], None, 2, &[&[0, 1], &[2, 3], &[4]]);
    }

    #[test]
    fn sequences_with_a_common_prefix_meet_and_others_stay_apart() {
        let (a, b, c, d) = ([5, 6, 1], [9, 8, 2], [5, 6, 3], [5, 7, 4]);
        check(&[(&a, &[40]), (&b, &[40]), (&c, &[41]), (&d, &[42])], None, 8, &[&[0, 2, 3], &[1]]);
        // The longest common prefixes share a tile where not all can.
        check(&[(&a, &[40]), (&d, &[40]), (&c, &[41])], None, 2, &[&[0, 2], &[1]]);
    }

    #[test]
    fn entries_behind_the_window_are_not_compared() {
        let (a, b) = ([u32::MAX, 6, 1], [0, 6, 2]);
        check(&[(&a, &[40]), (&b, &[40])], Some(20), 8, &[&[0, 1]]);
        check(&[(&a, &[40]), (&b, &[40])], None, 8, &[&[1], &[0]]);
    }

    #[test]
    fn a_chunk_and_a_decode_of_its_prefix_share_tiles() {
        check(&[(&[4, 5], &[16, 17, 18]), (&[4, 6], &[20])], None, 3, &[&[0, 1, 2], &[3]]);
        check(&[(&[4, 6], &[20]), (&[4, 5], &[16, 17, 18])], None, 3, &[&[1, 2, 3], &[0]]);
    }

    #[test]
    fn no_rows_make_no_tiles() {
        check(&[], None, 3, &[]);
    }
}
