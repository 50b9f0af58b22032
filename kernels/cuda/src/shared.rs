//! Prefixes that decodes have in common: rows whose tables begin with the same slots read those pages together. Found anew for each call, in the time that it takes
//! to read the tables once.

use ashlar_kernels::ops::{Query, SEGMENT_TOKENS};

/// Segments that a prefix has at least.
const SEGMENTS_MIN: usize = 4;
/// Slots that are compared at once.
const BLOCK: usize = 32;

/// Rows whose tables agree in their first `segments`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    /// Places in the list of queries.
    pub(crate) rows: Vec<usize>,
    pub(crate) segments: usize,
}

/// Rows that share a prefix, two at least. Entries of a table count as far as its row sees them; no window may hide the first.
pub(crate) fn prefixes(queries: &[Query], tables: &[u32], page_tokens: usize) -> Vec<Shared> {
    let table = |row: usize| &tables[queries[row].table_start as usize..][..queries[row].position as usize / page_tokens + 1];
    let pages_min = (SEGMENTS_MIN * SEGMENT_TOKENS).div_ceil(page_tokens);
    let mut rows: Vec<usize> = (0..queries.len()).filter(|row| table(*row).len() >= pages_min).collect();
    rows.sort_by_key(|row| &table(*row)[..pages_min]);
    let mut found: Vec<Shared> = Vec::new();
    for alike in rows.chunk_by(|a, b| table(*a)[..pages_min] == table(*b)[..pages_min]) {
        let mut open: Option<Shared> = None;
        for &row in alike {
            if let Some(shared) = &mut open {
                let segments = shared.segments.min(common(table(shared.rows[0]), table(row)) * page_tokens / SEGMENT_TOKENS);
                // One more row may shorten what all share, but not so that less is saved.
                if shared.rows.len() == 1 || segments * (shared.rows.len() + 1) >= shared.segments * shared.rows.len() {
                    shared.rows.push(row);
                    shared.segments = segments;
                    continue;
                }
            }
            found.extend(open.replace(Shared { rows: vec![row], segments: table(row).len() * page_tokens / SEGMENT_TOKENS }));
        }
        found.extend(open);
    }
    found.retain(|shared| shared.rows.len() > 1);
    found
}

/// Entries in which two tables agree from their beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    let blocks = BLOCK * std::iter::zip(a.chunks_exact(BLOCK), b.chunks_exact(BLOCK)).take_while(|(a, b)| a == b).count();
    blocks + std::iter::zip(&a[blocks..], &b[blocks..]).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_meet_where_their_tables_begin_alike() {
        // Pages of 64 tokens. Rows 0, 2 and 3 share six, row 4 four of them; row 1 is of another kind, row 5 too short.
        let prefix = [9, 8, 7, 6, 5, 4];
        let with = |shared: usize, own: u32| prefix[..shared].iter().copied().chain([own; 40]).collect::<Vec<u32>>();
        let each = [with(6, 20), with(0, 21), with(6, 22), with(6, 23), with(4, 24), prefix[..2].to_vec()];
        let lengths = [7, 40, 40, 8, 7, 2];
        let queries: Vec<Query> = (0..6)
            .map(|row| Query { table_start: each[..row].iter().map(Vec::len).sum::<usize>() as u32, position: lengths[row] * 64 - 1 })
            .collect();
        let found = prefixes(&queries, &each.concat(), 64);
        assert_eq!(
            found,
            [Shared { rows: vec![0, 2, 3], segments: 6 }],
            "a fourth row would cost two of six segments: 4 x 4 is below 3 x 6"
        );
        let two = prefixes(&[queries[0], queries[4]], &each.concat(), 64);
        assert_eq!(two, [Shared { rows: vec![0, 1], segments: 4 }]);
    }

    #[test]
    fn tables_are_compared_to_their_first_difference() {
        let a: Vec<u32> = (0..100).collect();
        for at in [0, 1, 31, 32, 33, 64, 99] {
            let mut b = a.clone();
            b[at] = 1000;
            assert_eq!((common(&a, &b), common(&a, &a[..at])), (at, at));
        }
    }
}
