//! Rules on the documents: every relative link and every heading that it points to exists.

use std::collections::BTreeSet;

use crate::Violation;
use crate::tree::Tree;

/// Relative links and pictures in Markdown name files of the repository, and their `#anchors` name headings.
pub fn links_resolve(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in tree.texts(".md") {
        for (line, target) in links(text) {
            if let Err(message) = resolve(tree, path, text, &target) {
                violations.push(Violation::new(path, line, message));
            }
        }
    }
    violations
}

fn resolve(tree: &Tree, from: &str, text: &str, target: &str) -> Result<(), String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return Ok(());
    }
    let (file, anchor) = target.split_once('#').map_or((target, None), |(file, anchor)| (file, Some(anchor)));
    let full = if file.is_empty() { from.to_owned() } else { join(from, file).ok_or(format!("link `{target}` leaves the repository"))? };
    if !tree.holds(&full) {
        return Err(format!("link `{target}`: there is no `{full}`"));
    }
    let Some(anchor) = anchor else { return Ok(()) };
    let aimed = if file.is_empty() { Some(text) } else { tree.files.get(&full).and_then(|file| file.text.as_deref()) };
    match aimed {
        Some(aimed) if full.ends_with(".md") && !anchors(aimed).contains(anchor) => {
            Err(format!("link `{target}`: `{full}` has no heading `#{anchor}`"))
        }
        _ => Ok(()),
    }
}

/// A path relative to the folder of `from`, without `.` and `..`; none if it climbs out.
fn join(from: &str, relative: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in relative.trim_end_matches('/').split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Inline links and pictures `[..](target)` outside code.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (line, text) in prose(text) {
        let mut rest = text.as_str();
        while let Some(at) = rest.find("](") {
            rest = &rest[at + 2..];
            let Some(end) = rest.find(')') else { break };
            let target = rest[..end].split_whitespace().next().unwrap_or_default();
            links.push((line, target.trim_matches(['<', '>']).to_owned()));
            rest = &rest[end..];
        }
    }
    links
}

/// Lines outside fenced code, with inline code blanked.
fn prose(text: &str) -> Vec<(usize, String)> {
    let mut fenced = false;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            let outside: Vec<&str> = line.split('`').step_by(2).collect();
            lines.push((index + 1, outside.join(" ")));
        }
    }
    lines
}

/// The headings' anchors, as the usual hosts spell them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut fenced = false;
    let mut anchors = BTreeSet::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        let Some(title) = line.strip_prefix('#').filter(|_| !fenced) else {
            continue;
        };
        let title = title.trim_start_matches('#').trim().to_lowercase();
        anchors.insert(
            title
                .chars()
                .filter_map(|c| if c == ' ' { Some('-') } else { (c.is_alphanumeric() || c == '-' || c == '_').then_some(c) })
                .collect(),
        );
    }
    anchors
}
