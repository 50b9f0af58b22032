//! `check_integrity`: every page is free, cached or owned, every hidden row likewise, and counts agree. Tests call it after each event.

use std::collections::BTreeMap;

use super::engine::Engine;
use super::pages::ClassIndex;

impl Engine {
    /// The first fault found, as a sentence; `Ok` when all is consistent.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut held: BTreeMap<(ClassIndex, u32), u32> = BTreeMap::new();
        for (class, slot) in self.leaving.iter().flat_map(|leaving| &leaving.pages) {
            *held.entry((*class, *slot)).or_default() += 1;
        }
        let mut hidden_count = 0;
        for (id, sequence) in &self.sequences {
            let span = self.span(sequence.span);
            for (attention, slots) in span.attention.iter().zip(&sequence.pages) {
                for slot in slots {
                    *held.entry((attention.class, *slot)).or_default() += 1;
                }
            }
            hidden_count += sequence.boundary.iter().map(std::collections::VecDeque::len).sum::<usize>();
            let known = sequence.tokens.len() as u32 + sequence.promised_tokens;
            if span.host.begins_with_embed && (known > sequence.tokens_max() || sequence.computed[0] > known) {
                return Err(format!(
                    "sequence {id:?} computed {} of {known} tokens, at most {}",
                    sequence.computed[0],
                    sequence.tokens_max()
                ));
            }
            for i in 1..sequence.computed.len() {
                let (upper, lower) = (sequence.computed[i - 1], sequence.computed[i]);
                if lower > upper {
                    return Err(format!("sequence {id:?} computed {lower} tokens below {upper}"));
                }
                if sequence.boundary[i - 1].len() != (upper - lower) as usize {
                    return Err(format!(
                        "sequence {id:?} keeps {} hidden rows for {} tokens",
                        sequence.boundary[i - 1].len(),
                        upper - lower
                    ));
                }
            }
        }
        if hidden_count + self.hidden_free.len() != self.limits.hidden_rows_max as usize {
            return Err(format!("{hidden_count} hidden rows kept, {} free, of {}", self.hidden_free.len(), self.limits.hidden_rows_max));
        }
        self.pages.check(&held)
    }
}
