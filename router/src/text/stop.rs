//! Stop strings, found in a stream of text however it is cut. Text that may become a stop string waits, as little of it as
//! possible: the longest end of the text that begins a stop string. The first stop string to be complete ends the text;
//! where two become complete at the same byte, the one that began earlier. So the result does not depend on the cuts.

use std::sync::Arc;

/// Stop strings of a request, prepared once and shared by its choices.
#[derive(Debug, Default)]
pub struct Stops {
    stops: Vec<Stop>,
}

#[derive(Debug)]
struct Stop {
    bytes: Vec<u8>,
    /// `fail[k]`: length of the longest proper prefix of the stop that ends its first `k + 1` bytes (Knuth, Morris, Pratt).
    fail: Vec<usize>,
}

impl Stops {
    /// Prepares stop strings. Empty ones are not allowed.
    pub fn new(texts: &[String]) -> Self {
        let stops = texts.iter().map(|text| Stop::new(text)).collect();
        Self { stops }
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        assert!(!text.is_empty(), "an empty stop string would end every text");
        let bytes = text.as_bytes().to_vec();
        let mut fail = vec![0; bytes.len()];
        for i in 1..bytes.len() {
            let mut matched = fail[i - 1];
            while matched > 0 && bytes[i] != bytes[matched] {
                matched = fail[matched - 1];
            }
            fail[i] = if bytes[i] == bytes[matched] { matched + 1 } else { 0 };
        }
        Self { bytes, fail }
    }

    /// The number of the stop's bytes matched after one more byte.
    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        while matched > 0 && self.bytes[matched] != byte {
            matched = self.fail[matched - 1];
        }
        if self.bytes[matched] == byte { matched + 1 } else { 0 }
    }
}

/// The state of one sequence.
#[derive(Debug)]
pub struct StopStrings {
    stops: Arc<Stops>,
    /// Matched bytes of each stop at the end of the text so far.
    matched: Vec<usize>,
    /// Text that is not released yet.
    held: String,
    found: bool,
}

impl StopStrings {
    /// At the start of a text.
    pub fn new(stops: Arc<Stops>) -> Self {
        let matched = vec![0; stops.stops.len()];
        Self { stops, matched, held: String::new(), found: false }
    }

    /// Takes more text and appends to `out` what is now certain not to be part of a stop string. Returns whether one is
    /// complete; then what was before it has been released and nothing more will be.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.found {
            return true;
        }
        if self.stops.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        for (index, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for (stop, matched) in self.stops.stops.iter().zip(&mut self.matched) {
                *matched = stop.advance(*matched, byte);
                if *matched == stop.bytes.len() {
                    longest = longest.max(*matched);
                    *matched = stop.fail[*matched - 1];
                }
            }
            if longest > 0 {
                // The stop ends on a character's border because both texts are UTF-8.
                self.held.push_str(&text[..=index]);
                self.held.truncate(self.held.len() - longest);
                out.push_str(&self.held);
                self.held.clear();
                self.found = true;
                return true;
            }
        }
        self.held.push_str(text);
        let keep = self.matched.iter().copied().max().unwrap_or(0);
        let release = self.held.len() - keep;
        out.push_str(&self.held[..release]);
        self.held.drain(..release);
        false
    }

    /// Appends what waits: the text ended without a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], parts: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut state = StopStrings::new(Arc::new(Stops::new(&stops)));
        let mut shown = Vec::new();
        for part in parts {
            let mut out = String::new();
            let found = state.push(part, &mut out);
            shown.push(out);
            if found {
                return (shown, true);
            }
        }
        let mut out = String::new();
        state.finish(&mut out);
        shown.push(out);
        (shown, false)
    }

    #[test]
    fn only_what_may_be_a_stop_waits() {
        assert_eq!(run(&["END"], &["aE", "N", "x", "E"]), (vec!["a".into(), "".into(), "ENx".into(), "".into(), "E".into()], false));
        assert_eq!(run(&["END"], &["aE", "ND", "never"]), (vec!["a".into(), "".into()], true));
        assert_eq!(run(&["aab"], &["aaa", "ab!"]), (vec!["a".into(), "a".into()], true));
        assert_eq!(run(&[], &["all"]), (vec!["all".into(), "".into()], false));
    }

    #[test]
    fn the_first_complete_stop_wins() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".into()], true));
        assert_eq!(run(&["c", "bc", "abc"], &["xab", "cd"]), (vec!["x".into(), "".into()], true));
        assert_eq!(run(&["é"], &["caf", "é!"]), (vec!["caf".into(), "".into()], true));
        assert_eq!(run(&["é"], &["è"]), (vec!["è".into(), "".into()], false));
    }
}
