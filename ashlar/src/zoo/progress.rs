//! Progress of long work: a bar on a terminal, a line every tenth elsewhere (logs, pipes, CI).

use std::io::IsTerminal;
use std::sync::Mutex;

use ashlar_zoo::ingest::{Progress, Stage, human_bytes};
use indicatif::{ProgressBar, ProgressStyle};

/// What suits standard error.
pub(super) fn for_terminal() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() { Box::new(Bar::default()) } else { Box::new(Lines::default()) }
}

/// A bar of so many passes over a text; nothing where standard error is no terminal.
pub(super) fn of_passes(count: usize) -> ProgressBar {
    of_windows("measuring", count)
}

/// The same of another work, window by window.
pub(super) fn of_windows(verb: &'static str, count: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:>12} {wide_bar} {pos}/{len} passes {eta}").expect("a constant template");
    ProgressBar::new(count as u64).with_style(style).with_prefix(verb)
}

#[derive(Default)]
struct Bar(Mutex<Option<ProgressBar>>);

#[derive(Default)]
struct Lines(Mutex<Counter>);

#[derive(Default)]
struct Counter {
    verb: &'static str,
    total: u64,
    done: u64,
    tenths_said: u64,
}

fn verb(stage: Stage) -> &'static str {
    match stage {
        Stage::Download => "downloading",
        Stage::Hash => "checking",
        Stage::Store => "storing",
        Stage::Compare => "comparing",
        Stage::Quantise => "quantising",
        Stage::Cut => "cutting",
        Stage::Profile => "profiling",
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Progress for Bar {
    fn begin(&self, stage: Stage, bytes: u64) {
        let style = ProgressStyle::with_template("{prefix:>12} {wide_bar} {bytes}/{total_bytes} {eta}").expect("a constant template");
        *locked(&self.0) = Some(ProgressBar::new(bytes).with_style(style).with_prefix(verb(stage)));
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*locked(&self.0) {
            bar.inc(bytes);
        }
    }

    fn end(&self) {
        if let Some(bar) = locked(&self.0).take() {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Lines {
    fn begin(&self, stage: Stage, bytes: u64) {
        *locked(&self.0) = Counter { verb: verb(stage), total: bytes, done: 0, tenths_said: 0 };
        eprintln!("{} {}", verb(stage), human_bytes(bytes));
    }

    fn advance(&self, bytes: u64) {
        let mut counter = locked(&self.0);
        counter.done += bytes;
        let tenths = counter.done.saturating_mul(10) / counter.total.max(1);
        // Only long work is worth lines in between.
        if counter.total >= 100_000_000 && tenths > counter.tenths_said && tenths < 10 {
            counter.tenths_said = tenths;
            eprintln!("{} {}0%", counter.verb, tenths);
        }
    }

    fn end(&self) {}
}
