//! `ashlar bench kernels --full`: every format, instruction set, shape and row count. It takes hours, so it writes its JSON after every
//! layer and goes on from there when it is started again.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use ashlar_kernels::bench::claims::{LLAMA, QWEN, SMOLLM2};
use ashlar_kernels::bench::{BenchOptions, Cell, Layer};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa, probe};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Bf16Compute, Ops};
use serde::{Deserialize, Serialize};

use crate::output;

/// Time of one cell.
const BUDGET: Duration = Duration::from_millis(100);
/// A layer whose call takes longer is not measured with more rows.
const CALL_SECONDS_MAX: f64 = 2.0;
/// Formats, each with the groups that it is used with.
const DTYPES: &str = "f32,f16,bf16,int8g16,int8g32,int8g64,int8g128,int8mg32,int8mg64,int4g32,int4g64,int4g128,int4mg32,int4mg64,int4zg128,int1g128,fp8g128,\
    q8_0,q4_0,q4_1,q5_0,q5_1,q4_k,q5_k,q6_k";
const ROW_COUNTS: [usize; 26] = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 128, 129, 255, 256, 512, 1024, 2048];

/// What is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Report {
    /// On what: a report of something else is not gone on with.
    origin: Origin,
    layers: Vec<Measured>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    version: String,
    commit: Option<String>,
    machine: String,
    threads: usize,
}

/// The cells of one layer on one instruction set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Measured {
    isa: String,
    dtype: String,
    outputs: usize,
    inputs: usize,
    read_bytes_per_second: f64,
    f32_ops_per_second: f64,
    bf16_ops_per_second: f64,
    int8_ops_per_second: f64,
    cells: Vec<MeasuredCell>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct MeasuredCell {
    row_count: usize,
    seconds: f64,
    share: f64,
}

impl Measured {
    fn key(&self) -> (String, String, usize, usize) {
        (self.isa.clone(), self.dtype.clone(), self.outputs, self.inputs)
    }
}

/// Measures what the report at `path` does not have yet.
pub(super) fn run(path: &Path, commit: Option<&str>, threads: usize, isas: &[Isa], bf16_compute: Bf16Compute) -> anyhow::Result<()> {
    let cpus: Vec<Cpu> = isas.iter().map(|isa| Cpu::new(CpuOptions { threads, isa: Some(*isa), bf16_compute })).collect();
    let origin = Origin {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: commit.map(str::to_owned),
        machine: super::super::process::machine(),
        threads: cpus.first().map_or(threads, Cpu::threads),
    };
    let mut report = resume(path, origin)?;
    let done: BTreeSet<_> = report.layers.iter().map(Measured::key).collect();
    let dtypes = DTYPES.split(',').map(|name| name.parse::<Dtype>().expect("a format")).collect::<Vec<_>>();
    let shapes: Vec<(usize, usize)> = [SMOLLM2, QWEN, LLAMA].iter().flat_map(|model| model.layers).chain([(49_152, 576)]).collect();
    let total = cpus.len() * dtypes.len() * shapes.len();
    output::line(format_args!("{} of {total} layers are there already", done.len()))?;
    for cpu in &cpus {
        let options = BenchOptions { budget: BUDGET, ..BenchOptions::default() };
        for &(outputs, inputs) in &shapes {
            for &dtype in &dtypes {
                let key = (cpu.describe(), dtype.to_string(), outputs, inputs);
                if done.contains(&key) || dtype.bytes(outputs, inputs).is_none() {
                    continue;
                }
                let ceilings = probe::ceilings(cpu, options.rotate_bytes).context("probe the machine")?;
                let layer = Layer::new(cpu, dtype, outputs, inputs).with_context(|| format!("pack {dtype} {outputs}x{inputs}"))?;
                let mut cells = Vec::new();
                for row_count in ROW_COUNTS {
                    let cell: Cell = layer.measure(cpu, &ceilings, row_count, &options).context("make room for the rows")?;
                    output::line(format_args!("{:>5}/{total} {} {cell}", report.layers.len() + 1, cpu.describe()))?;
                    cells.push(MeasuredCell { row_count, seconds: cell.seconds, share: cell.share });
                    if cell.seconds > CALL_SECONDS_MAX {
                        break;
                    }
                }
                report.layers.push(Measured {
                    isa: key.0,
                    dtype: key.1,
                    outputs,
                    inputs,
                    read_bytes_per_second: ceilings.read_bytes_per_second,
                    f32_ops_per_second: ceilings.f32_ops_per_second,
                    bf16_ops_per_second: ceilings.bf16_ops_per_second,
                    int8_ops_per_second: ceilings.int8_ops_per_second,
                    cells,
                });
                write(path, &report)?;
            }
        }
    }
    Ok(())
}

/// The report at `path`, to be gone on with; an empty one where there is none.
fn resume(path: &Path, origin: Origin) -> anyhow::Result<Report> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Report { origin, layers: Vec::new() }),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let report: Report = serde_json::from_str(&text).with_context(|| format!("{} is no report of --full", path.display()))?;
    ensure!(
        report.origin == origin,
        "{} was measured elsewhere ({:?}, here is {origin:?}): name another file",
        path.display(),
        report.origin
    );
    Ok(report)
}

/// Whole or not at all.
fn write(path: &Path, report: &Report) -> anyhow::Result<()> {
    let partial = path.with_added_extension("partial");
    let write = || -> anyhow::Result<()> {
        std::fs::write(&partial, serde_json::to_string_pretty(report)? + "\n")?;
        Ok(std::fs::rename(&partial, path)?)
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(machine: &str) -> Origin {
        Origin { version: "1".into(), commit: None, machine: machine.into(), threads: 2 }
    }

    #[test]
    fn a_report_is_gone_on_with_on_its_own_machine_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("full.json");
        let mut report = resume(&path, origin("a")).unwrap();
        assert!(report.layers.is_empty());
        report.layers.push(Measured {
            isa: "scalar".into(),
            dtype: "f32".into(),
            outputs: 2,
            inputs: 3,
            read_bytes_per_second: 1.0,
            f32_ops_per_second: 2.0,
            bf16_ops_per_second: 4.0,
            int8_ops_per_second: 3.0,
            cells: vec![MeasuredCell { row_count: 1, seconds: 0.5, share: 0.25 }],
        });
        write(&path, &report).unwrap();
        assert_eq!(resume(&path, origin("a")).unwrap(), report);
        let error = resume(&path, origin("b")).unwrap_err().to_string();
        assert!(error.contains("measured elsewhere") && error.contains("name another file"), "{error}");
        std::fs::write(&path, "{}").unwrap();
        assert!(resume(&path, origin("a")).unwrap_err().to_string().contains("is no report of --full"));
    }

    #[test]
    fn every_format_is_one() {
        assert!(DTYPES.split(',').all(|name| name.parse::<Dtype>().is_ok()));
    }
}
