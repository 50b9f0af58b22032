//! Recorded traffic as load, where the data are: in `$ASHLAR_DATA`, or `shared/data` beside the repository. Elsewhere nothing is tested, and
//! that is said.

#![allow(clippy::unwrap_used, reason = "tests may unwrap, also in their helper functions")]

use std::path::{Path, PathBuf};

use ashlar_sim::load::Load;
use ashlar_sim::{Options, run, trace};

const REQUESTS: usize = 24;

fn folder() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("ASHLAR_DATA").map_or_else(beside, PathBuf::from);
    folder.is_dir().then_some(folder)
}

fn text(path: &Path) -> String {
    if path.extension().is_some_and(|extension| extension == "gz") {
        let output = std::process::Command::new("gzip").arg("-dc").arg(path).output().expect("gzip runs");
        return String::from_utf8(output.stdout).expect("traces are text");
    }
    std::fs::read_to_string(path).expect("the trace is there")
}

fn load(path: &Path, requests: usize) -> Load {
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
    let lengths = trace::lengths_beside(name).map(|lengths| text(&path.with_file_name(lengths)));
    trace::parse(name, &text(path), lengths.as_deref(), requests).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn recorded_traffic_runs() {
    let Some(folder) = folder() else {
        println!("skipped: no folder of recorded traffic");
        return;
    };
    let files = [
        "azure-llm-2023/AzureLLMInferenceTrace_conv.csv",
        "azure-llm-2023/AzureLLMInferenceTrace_code.csv",
        "mooncake-fast25/conversation_trace.jsonl.gz",
        "mooncake-fast25/synthetic_trace.jsonl.gz",
        "servegen/m-small_rates.csv.gz",
    ];
    for file in files {
        let load = load(&folder.join(file), REQUESTS);
        assert_eq!(load.arrivals.len(), REQUESTS, "{file}");
        let trace = Some((file.to_owned(), load));
        match run(&Options { seed: 1, trace, requests: REQUESTS as u64, ..Options::default() }) {
            Ok(report) => println!("{file}:\n{report}"),
            Err(failure) => panic!("{file}: {failure}"),
        }
    }
}
