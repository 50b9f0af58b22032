//! Just enough of Rust's syntax to tell code from comments and strings: tokens with their lines, paths with `{}` groups
//! opened, and the spans of test-only items. It does not parse; what it cannot tell it leaves in.

/// A token of code: an identifier, a number, `::`, or one character. Strings and characters come out as `""`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Line, from 1.
    pub line: usize,
    /// The text.
    pub text: String,
}

impl Token {
    /// Whether it is an identifier or keyword.
    pub fn is_word(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// The tokens of a file, without comments.
pub fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let start = at;
        let end = token_end(&chars, at);
        let kind = kind_of(&chars, start);
        match kind {
            Kind::Space | Kind::Comment => {}
            Kind::Quoted => tokens.push(Token { line, text: "\"\"".into() }),
            Kind::Code => tokens.push(Token { line, text: chars[start..end].iter().collect() }),
        }
        line += chars[start..end].iter().filter(|c| **c == '\n').count();
        at = end;
    }
    tokens
}

/// The tokens that are built into the product: without items under `#[cfg(test)]`.
pub fn product_tokens(text: &str) -> Vec<Token> {
    let all = tokens(text);
    let mut kept = Vec::with_capacity(all.len());
    let mut at = 0;
    while at < all.len() {
        if is_cfg_test(&all[at..]) {
            at = item_end(&all, at + CFG_TEST.len());
        } else {
            kept.push(all[at].clone());
            at += 1;
        }
    }
    kept
}

/// Every path in the tokens (`a`, `a::b`, and each leaf of `a::{b, c::d}`), with its line.
pub fn paths(tokens: &[Token]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at].is_word() {
            at = path_at(tokens, at, &mut Vec::new(), &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// An identifier's words in lower case: `ModelId` and `model_id` are both `model`, `id`.
pub fn words(identifier: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut previous = '_';
    for c in identifier.chars() {
        let begins = previous == '_' || (c.is_uppercase() && !previous.is_uppercase());
        if c != '_' {
            if begins || words.is_empty() {
                words.push(String::new());
            }
            if let Some(word) = words.last_mut() {
                word.extend(c.to_lowercase());
            }
        }
        previous = c;
    }
    words
}

enum Kind {
    Space,
    Comment,
    Quoted,
    Code,
}

fn kind_of(chars: &[char], at: usize) -> Kind {
    let rest = &chars[at..];
    match rest {
        [c, ..] if c.is_whitespace() => Kind::Space,
        ['/', '/' | '*', ..] => Kind::Comment,
        ['"', ..] => Kind::Quoted,
        ['\'', ..] if !is_lifetime(rest) => Kind::Quoted,
        _ if string_prefix(rest).is_some() => Kind::Quoted,
        _ => Kind::Code,
    }
}

fn token_end(chars: &[char], at: usize) -> usize {
    let rest = &chars[at..];
    let length = match rest {
        ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
        ['/', '*', ..] => block_comment_length(rest),
        [':', ':', ..] => 2,
        ['"', ..] => quoted_length(rest, 1, '"'),
        ['\'', ..] if is_lifetime(rest) => 1 + word_length(&rest[1..]),
        ['\'', ..] => quoted_length(rest, 1, '\''),
        _ => match string_prefix(rest) {
            Some((prefix, Some(hashes))) => raw_length(rest, prefix, hashes),
            Some((prefix, None)) => quoted_length(rest, prefix + 1, rest[prefix]),
            None => word_length(rest).max(1),
        },
    };
    at + length
}

fn is_lifetime(rest: &[char]) -> bool {
    // 'a' is a character; 'a, 'static and '_ are lifetimes.
    matches!(rest.get(1), Some(c) if c.is_alphabetic() || *c == '_') && rest.get(2) != Some(&'\'')
}

/// For `b"`, `c"`, `r"`, `br#"`, `b'`: the letters' count, and the count of hashes if raw.
fn string_prefix(rest: &[char]) -> Option<(usize, Option<usize>)> {
    let letters = rest.iter().take(2).take_while(|c| matches!(c, 'b' | 'c' | 'r')).count();
    if letters == 0 {
        return None;
    }
    if rest[letters - 1] == 'r' {
        let hashes = rest[letters..].iter().take_while(|c| **c == '#').count();
        return (rest.get(letters + hashes) == Some(&'"')).then_some((letters, Some(hashes)));
    }
    matches!(rest.get(letters), Some('"' | '\'')).then_some((letters, None)).filter(|_| letters == 1)
}

fn word_length(rest: &[char]) -> usize {
    rest.iter().take_while(|c| c.is_alphanumeric() || **c == '_').count()
}

fn quoted_length(rest: &[char], from: usize, quote: char) -> usize {
    let mut at = from;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            c if c == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_length(rest: &[char], letters: usize, hashes: usize) -> usize {
    let mut at = letters + hashes + 1;
    while at < rest.len() {
        if rest[at] == '"' && rest[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    rest.len()
}

fn block_comment_length(rest: &[char]) -> usize {
    let (mut at, mut depth) = (2, 1);
    while at < rest.len() && depth > 0 {
        match rest[at..] {
            ['/', '*', ..] => (at, depth) = (at + 2, depth + 1),
            ['*', '/', ..] => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
    }
    at.min(rest.len())
}

fn is_cfg_test(tokens: &[Token]) -> bool {
    tokens.len() >= CFG_TEST.len() && tokens.iter().zip(CFG_TEST).all(|(token, text)| token.text == text)
}

/// The end of the item that starts at `at`: past its `;`, or past the `}` of its first brace.
fn item_end(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0usize;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && tokens[at].text == "}" {
                    return at + 1;
                }
            }
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    at
}

fn path_at(tokens: &[Token], mut at: usize, prefix: &mut Vec<String>, found: &mut Vec<(usize, Vec<String>)>) -> usize {
    let depth = prefix.len();
    let line = tokens[at].line;
    prefix.push(tokens[at].text.clone());
    at += 1;
    while at + 1 < tokens.len() && tokens[at].text == "::" {
        let next = &tokens[at + 1];
        if next.is_word() {
            prefix.push(next.text.clone());
            at += 2;
        } else if next.text == "{" {
            at += 2;
            while at < tokens.len() && tokens[at].text != "}" {
                at = if tokens[at].is_word() { path_at(tokens, at, prefix, found) } else { at + 1 };
            }
            prefix.truncate(depth);
            return at + 1;
        } else {
            break; // `::<` and `::*`
        }
    }
    found.push((line, prefix.clone()));
    prefix.truncate(depth);
    at
}

const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(source: &str) -> Vec<String> {
        tokens(source).into_iter().map(|token| token.text).collect()
    }

    #[test]
    fn comments_and_strings_are_not_code() {
        assert_eq!(texts("a // b\n/* c /* d */ e */ f"), ["a", "f"]);
        assert_eq!(
            texts(r##"x("tokio", r#"a "b" c"#, b'z', '\'', "q\"r")"##),
            ["x", "(", "\"\"", ",", "\"\"", ",", "\"\"", ",", "\"\"", ",", "\"\"", ")"]
        );
        assert_eq!(texts("fn f<'a>(s: &'a str)"), ["fn", "f", "<", "'a", ">", "(", "s", ":", "&", "'a", "str", ")"]);
    }

    #[test]
    fn lines_are_counted_through_strings() {
        let last = tokens("a\n\"x\ny\"\nb").pop().expect("there are tokens");
        assert_eq!((last.line, last.text.as_str()), (4, "b"));
    }

    #[test]
    fn groups_are_opened() {
        let found: Vec<String> = paths(&tokens("use std::{fs, time::{Duration, Instant}, io::*}; a::b::<T>();"))
            .into_iter()
            .map(|(_, path)| path.join("::"))
            .collect();
        assert_eq!(found, ["use", "std::fs", "std::time::Duration", "std::time::Instant", "std::io", "a::b", "T"]);
    }

    #[test]
    fn test_items_are_left_out() {
        let kept: Vec<String> =
            product_tokens("a #[cfg(test)] mod tests { fn f() { b } } c #[cfg(test)] use d; e").into_iter().map(|t| t.text).collect();
        assert_eq!(kept, ["a", "c", "e"]);
    }

    #[test]
    fn identifiers_split_into_words() {
        assert_eq!(words("ModelId"), ["model", "id"]);
        assert_eq!(words("served_models_max"), ["served", "models", "max"]);
        assert_eq!(words("KVPage"), ["kvpage"]);
    }
}
