//! `ashlar bench kernels`: what the machine can do, and how much of it each linear layer gets. The measuring is
//! `ashlar_kernels::bench`; here are arguments, table and JSON.

mod claims;
mod full;

use std::path::PathBuf;

use anyhow::{Context, ensure};
use ashlar_kernels::bench::claims::ClaimOptions;
use ashlar_kernels::bench::{self, BenchOptions};
use ashlar_kernels::cpu::{Cpu, CpuOptions, Isa, probe};
use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Bf16Compute, Ops};
use serde_json::{Value, json};

use crate::bench::args::{report_file, threads, whole};
use crate::devices::check_isa;
use crate::output;

/// Bytes of a layer or of the memory that one-row cells rotate through.
const BYTES_MAX: usize = 16 << 30;
/// Rows of a batch.
const ROWS_MAX: usize = 1 << 16;
/// What `BenchOptions::default()` measures, as it is typed.
const DTYPES_DEFAULT: &str = "f32,bf16,int8g32,int4g32,q8_0,q4_1";
const SHAPES_DEFAULT: &str = "576x576,1536x576,576x1536,49152x576";
const ROWS_DEFAULT: &str = "1,64,512";
const ROTATE_MIB_DEFAULT: &str = "1024";

/// Measures the kernels.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct KernelsArgs {
    /// Threads [default: all cores]
    #[arg(long, default_value = "0", hide_default_value = true, allow_negative_numbers = true, value_parser = threads)]
    threads: usize,
    /// Instruction set: avx512-bf16, avx512, avx-vnni, avx2 or scalar [default: the best that the machine has]
    #[arg(long)]
    isa: Option<Isa>,
    /// What layers with bf16 weights are computed from: f32 or bf16
    #[arg(long, default_value = "f32")]
    bf16_compute: Bf16Compute,
    /// Formats of weights, comma-separated: f32, f16, bf16, int8g32 and so on
    #[arg(long, value_name = "FORMATS", value_delimiter = ',', default_value = DTYPES_DEFAULT, value_parser = dtype)]
    dtypes: Vec<Dtype>,
    /// Shapes, comma-separated: outputs x inputs. Those of SmolLM2-135M where none are given
    #[arg(long, value_delimiter = ',', default_value = SHAPES_DEFAULT, value_parser = shape)]
    shapes: Vec<(usize, usize)>,
    /// Rows of a batch, comma-separated
    #[arg(long = "rows", value_name = "ROWS", value_delimiter = ',', default_value = ROWS_DEFAULT, allow_negative_numbers = true, value_parser = whole(1, ROWS_MAX))]
    row_counts: Vec<usize>,
    /// Check what the project claims of its kernels, and fail if something does not hold: shares of the read bandwidth and of the
    /// int8 peak, each measured in turns with it, what one row more costs, the choice of instruction set. Some minutes, on an
    /// otherwise idle machine
    #[arg(long = "assert", conflicts_with_all = ["full", "dtypes", "shapes", "row_counts"])]
    check: bool,
    /// Measure every format, instruction set, shape and row count: hours. Goes on from the JSON where it was stopped
    #[arg(long, requires = "json", conflicts_with_all = ["dtypes", "shapes", "row_counts", "rotate_mib"])]
    full: bool,
    /// MiB that one-row cells rotate through: at least 4 times the last cache
    #[arg(long, value_name = "MIB", default_value = ROTATE_MIB_DEFAULT, allow_negative_numbers = true, value_parser = whole(1, BYTES_MAX >> 20))]
    rotate_mib: usize,
    /// Write the table as JSON
    #[arg(long, value_name = "FILE", value_parser = report_file())]
    json: Option<PathBuf>,
    /// Commit, for the JSON
    #[arg(long)]
    commit: Option<String>,
}

/// Prints each cell as it is measured. It keeps all cores busy, so it runs outside the async threads.
pub(crate) async fn run(args: KernelsArgs) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || measure(&args)).await?
}

fn measure(args: &KernelsArgs) -> anyhow::Result<()> {
    let options = options(args)?;
    check_isa("--isa", args.isa)?;
    if let (true, Some(path)) = (args.full, &args.json) {
        let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|one| args.isa.map_or(one.available(), |isa| isa == *one)).collect();
        return full::run(path, args.commit.as_deref(), args.threads, &isas, args.bf16_compute);
    }
    let cpu = Cpu::new(CpuOptions { threads: args.threads, isa: args.isa, bf16_compute: args.bf16_compute });
    output::line(cpu.describe())?;
    let ceilings = probe::ceilings(&cpu, options.rotate_bytes).context("probe the machine")?;
    output::line(ceilings)?;
    if args.check {
        let claim_options = ClaimOptions { rotate_bytes: options.rotate_bytes, ..ClaimOptions::default() };
        let (claims, verdict) = claims::check(&cpu, &claim_options)?;
        write_json(args, &cpu, &ceilings, options.rotate_bytes, "claims", claims)?;
        return verdict;
    }
    let mut cells = Vec::new();
    for (shape, dtype) in options.shapes.iter().flat_map(|shape| options.dtypes.iter().map(move |dtype| (*shape, *dtype))) {
        let layer = BenchOptions { dtypes: vec![dtype], shapes: vec![shape], ..options.clone() };
        let mut printed = Ok(());
        bench::linear(&cpu, &ceilings, &layer, |cell| {
            if printed.is_ok() {
                printed = output::line(cell);
            }
            cells.push(json!({
                "dtype": cell.dtype.to_string(),
                "outputs": cell.outputs,
                "inputs": cell.inputs,
                "row_count": cell.row_count,
                "seconds": cell.seconds,
                "bytes_per_second": cell.bytes_per_second,
                "ops_per_second": cell.ops_per_second,
                "share": cell.share,
            }));
        })
        .context("pack a layer")?;
        // Nobody reads on: the layers that are left are not worth their time.
        printed?;
    }
    write_json(args, &cpu, &ceilings, options.rotate_bytes, "cells", cells)
}

fn write_json(
    args: &KernelsArgs,
    cpu: &Cpu,
    ceilings: &probe::Ceilings,
    rotate_bytes: usize,
    what: &str,
    measured: Vec<Value>,
) -> anyhow::Result<()> {
    let Some(path) = &args.json else { return Ok(()) };
    let report: Value = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": args.commit,
        "machine": super::process::machine(),
        "device": cpu.describe(),
        "ceilings": {
            "read_bytes_per_second": ceilings.read_bytes_per_second,
            "f32_ops_per_second": ceilings.f32_ops_per_second,
            "bf16_ops_per_second": ceilings.bf16_ops_per_second,
            "int8_ops_per_second": ceilings.int8_ops_per_second,
        },
        "rotate_bytes": rotate_bytes,
        what: measured,
    });
    std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n").with_context(|| format!("write {}", path.display()))
}

/// What is measured, if every format can have every shape.
fn options(args: &KernelsArgs) -> anyhow::Result<BenchOptions> {
    for (outputs, inputs) in &args.shapes {
        for dtype in &args.dtypes {
            ensure!(
                dtype.bytes(*outputs, *inputs).is_some(),
                "use --shapes {outputs}x{inputs} with {dtype}: its rows are whole blocks of {} inputs (--dtypes chooses formats)",
                dtype.block_columns()
            );
        }
    }
    Ok(BenchOptions {
        dtypes: args.dtypes.clone(),
        shapes: args.shapes.clone(),
        row_counts: args.row_counts.clone(),
        rotate_bytes: args.rotate_mib << 20,
        ..BenchOptions::default()
    })
}

fn dtype(name: &str) -> Result<Dtype, &'static str> {
    name.parse().map_err(
        |_| "expected f32, f16, bf16, int8g32 or int4g32 (and other groups; int8mg32 with minima), int1g128, or a GGUF format as q8_0",
    )
}

fn shape(text: &str) -> Result<(usize, usize), String> {
    let parts = text.split_once('x').and_then(|(outputs, inputs)| Some((outputs.parse::<usize>().ok()?, inputs.parse::<usize>().ok()?)));
    match parts {
        Some((outputs, inputs)) if outputs > 0 && inputs > 0 && outputs.saturating_mul(inputs).saturating_mul(4) <= BYTES_MAX => {
            Ok((outputs, inputs))
        }
        Some(_) => Err("a layer must have outputs and inputs, and at most 16 GiB as f32".into()),
        None => Err("a shape is outputs x inputs, as in 576x1536".into()),
    }
}

#[cfg(test)]
mod tests;
