//! Several layers in one call: equal bits over runs of different layers, formats and ranks, and those of each run alone.

use ashlar_kernels::format::Dtype;
use ashlar_kernels::ops::{Activation, Bf16Compute, Columns, Finish, LinearRun, Ops, PlacedPart};
use ashlar_kernels::reference::Reference;
use proptest::prelude::*;

use super::values::{Random, Tensor};
use super::{Case, assert_same, backends, backends_of, check, download, upload};

/// A layer and how many rows go through it; `skip` rows before them belong to nobody.
struct Run {
    parts: Vec<Tensor>,
    /// Where its parts have places the outputs that it leaves out before each.
    gaps: Option<Vec<usize>>,
    /// Whether each part reads the inputs behind those of the parts before it; else all read the same.
    is_diagonal: bool,
    bias: Option<Vec<f32>>,
    skip: usize,
    row_count: usize,
}

struct RunsCase {
    x: Vec<f32>,
    inputs: Columns,
    out: Vec<f32>,
    outputs: Columns,
    runs: Vec<Run>,
    finish: Finish,
    bf16_compute: Bf16Compute,
}

impl RunsCase {
    fn random(random: &mut Random, dtypes: &[Dtype], ranks: bool) -> Self {
        let cols = 32 * (1 + random.below(20));
        let mut runs = Vec::new();
        for _ in 0..1 + random.below(6) {
            let rank = |random: &mut Random| random.pick(&[1, 3, 4, 8, 16, 40, 64]);
            let cols = if ranks { rank(random) } else { cols };
            let is_diagonal = ranks && random.below(2) == 0;
            let parts: Vec<_> = (0..1 + random.below(3)).map(|_| (random.pick(dtypes), 1 + random.below(70))).collect();
            let parts: Vec<_> = (parts.into_iter())
                .map(|(dtype, rows)| {
                    let cols = if is_diagonal { rank(random) } else { cols };
                    random.tensor(dtype, rows, cols)
                })
                .collect();
            let is_placed = is_diagonal || random.below(3) == 0;
            let gaps = is_placed.then(|| parts.iter().map(|_| random.pick(&[0, 0, 7, 32])).collect());
            let (skip, row_count) = (random.pick(&[0, 0, 0, 2]), random.pick(&[0, 1, 1, 1, 2, 3, 9, 17]));
            let mut run = Run { parts, gaps, is_diagonal, bias: None, skip, row_count };
            run.bias = (random.below(3) == 0).then(|| random.tame(run.outputs()));
            runs.push(run);
        }
        let rows = runs.iter().map(|run| run.skip + run.row_count).sum::<usize>() + random.below(2);
        let columns = |random: &mut Random, width: usize| {
            let (offset, behind) = (random.pick(&[0, 0, 5, 64]), random.pick(&[0, 0, 3]));
            Columns { stride: offset + width + behind, offset, width }
        };
        let inputs = columns(random, runs.iter().map(Run::inputs).max().unwrap());
        let outputs = columns(random, runs.iter().map(Run::outputs).max().unwrap());
        let (x, out) = (random.wild(rows, inputs.stride), random.wild(rows, outputs.stride));
        Self {
            x,
            inputs,
            out,
            outputs,
            runs,
            finish: random.pick(&[Finish::Store, Finish::Add]),
            bf16_compute: random.pick(&[Bf16Compute::F32, Bf16Compute::Bf16]),
        }
    }

    /// Rows of each run.
    fn rows(&self) -> Vec<std::ops::Range<usize>> {
        let mut end = 0;
        let rows = self.runs.iter().map(|run| {
            let start = end + run.skip;
            end = start + run.row_count;
            start..end
        });
        rows.collect()
    }
}

impl Run {
    fn outputs(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum::<usize>() + self.gaps.iter().flatten().sum::<usize>()
    }

    fn inputs(&self) -> usize {
        if self.is_diagonal { self.parts.iter().map(|part| part.cols).sum() } else { self.parts[0].cols }
    }

    /// Each part with its first input and output.
    fn places(&self) -> Vec<(&Tensor, usize, usize)> {
        let (mut input, mut output) = (0, 0);
        let mut places = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            output += self.gaps.as_ref().map_or(0, |gaps| gaps[i]);
            places.push((part, input, output));
            input += if self.is_diagonal { part.cols } else { 0 };
            output += part.rows;
        }
        places
    }

    fn load<O: Ops>(&self, ops: &O) -> (O::Linear, Option<O::Vector>) {
        let views: Vec<_> = self.parts.iter().map(Tensor::view).collect();
        let places = self.places();
        let placed: Vec<_> = places
            .iter()
            .map(|(part, first_input, first_output)| PlacedPart {
                weights: part.view(),
                first_input: *first_input,
                first_output: *first_output,
            })
            .collect();
        let linear = if self.gaps.is_some() { ops.linear_placed(&placed) } else { ops.linear(&views) };
        (linear.unwrap(), self.bias.as_ref().map(|bias| ops.vector_f32(bias).unwrap()))
    }
}

impl Case for RunsCase {
    fn bf16_compute(&self) -> Bf16Compute {
        self.bf16_compute
    }

    fn run<O: Ops>(&self, ops: &O) -> Vec<f32> {
        let (x, mut out) = (upload(ops, &self.x), upload(ops, &self.out));
        let layers: Vec<_> = self.runs.iter().map(|run| run.load(ops)).collect();
        let runs: Vec<_> =
            layers.iter().zip(self.rows()).map(|((linear, bias), rows)| LinearRun { linear, bias: bias.as_ref(), rows }).collect();
        ops.linear_runs(&mut out, self.outputs, &x, self.inputs, &runs, self.finish);
        download(ops, &out, self.out.len())
    }
}

/// Each part of a run alone, dense, gives the bits that it has among the others; what belongs to no run stays.
fn check_alone(case: &RunsCase, got: &[f32]) {
    let mut expected = case.out.clone();
    // A device that does not compute so has nothing to show.
    let Some(cpu) = backends_of(case.bf16_compute).first() else { return };
    for (run, rows) in case.runs.iter().zip(case.rows()) {
        for (part, first_input, first_output) in run.places() {
            let (linear, outputs) = (cpu.linear(&[part.view()]).unwrap(), part.rows);
            let bias = run.bias.as_ref().map(|bias| cpu.vector_f32(&bias[first_output..][..outputs]).unwrap());
            for row in rows.clone() {
                let at = row * case.outputs.stride + case.outputs.offset + first_output;
                let mut out = upload(cpu, &case.out[at..][..outputs]);
                let x = upload(cpu, &case.x[row * case.inputs.stride + case.inputs.offset + first_input..][..part.cols]);
                cpu.linear_apply(&mut out, &x, 1, &linear, bias.as_ref(), case.finish);
                expected[at..][..outputs].copy_from_slice(&download(cpu, &out, outputs));
            }
        }
    }
    assert_same("each part alone", &expected, got);
}

const INT8: Dtype = Dtype::Int8 { group: 32 };
const INT4: Dtype = Dtype::Int4 { group: 32 };

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 4, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn runs_have_the_bits_of_each_run_alone(seed in any::<u64>()) {
        let mut random = Random(seed);
        let (one_bit, long) = (Dtype::Int1 { group: 128 }, Dtype::Int1 { group: 512 });
        let dtypes = [INT8, INT4, one_bit, long, Dtype::Q4_1, Dtype::Bf16, Dtype::F32];
        let kinds = random.pick(&[1, 2, 6]);
        let dtypes: Vec<_> = (0..kinds).map(|_| random.pick(&dtypes)).collect();
        let case = RunsCase::random(&mut random, &dtypes, false);
        check_alone(&case, &check(&case));
    }

    /// Gate and up of several layers: the bits of each layer alone.
    #[test]
    fn gated_runs_have_the_bits_of_each_run_alone(seed in any::<u64>()) {
        let mut random = Random(seed);
        let dtypes = [INT8, INT4, Dtype::Q4_1, Dtype::Bf16, Dtype::F32];
        let mut case = RunsCase::random(&mut random, &dtypes, false);
        let activation = random.pick(&[Activation::Silu, Activation::GeluTanh]);
        case.finish = Finish::Gate(activation);
        for run in &mut case.runs {
            let (rows, cols) = (run.parts[0].rows, run.parts[0].cols);
            run.parts.truncate(1);
            run.gaps = None;
            let dtype = random.pick(&dtypes);
            run.parts.push(random.tensor(dtype, rows, cols));
            run.bias = run.bias.as_ref().map(|_| random.tame(2 * rows));
        }
        let width = case.runs.iter().map(|run| run.parts[0].rows).max().unwrap();
        let (offset, rows) = (case.outputs.offset, case.out.len() / case.outputs.stride);
        case.outputs = Columns { stride: offset + width + 3, offset, width };
        case.out = random.wild(rows, case.outputs.stride);

        let (got, mut expected) = (check(&case), case.out.clone());
        let Some(cpu) = backends_of(case.bf16_compute).first() else { return Ok(()) };
        for (run, rows) in case.runs.iter().zip(case.rows()) {
            let ((linear, bias), width) = (run.load(cpu), run.parts[0].rows);
            for row in rows {
                let at = row * case.outputs.stride + offset;
                let mut out = upload(cpu, &case.out[at..][..width]);
                let x = upload(cpu, &case.x[row * case.inputs.stride + case.inputs.offset..][..run.inputs()]);
                cpu.linear_apply(&mut out, &x, 1, &linear, bias.as_ref(), case.finish);
                expected[at..][..width].copy_from_slice(&download(cpu, &out, width));
            }
        }
        assert_same("each layer alone", &expected, &got);
    }

    /// The expand of adapters: K is the rank, and several matrices in one row lie on a diagonal.
    #[test]
    fn mixed_ranks_have_the_bits_of_each_rank_alone(seed in any::<u64>()) {
        let mut random = Random(seed);
        let case = RunsCase::random(&mut random, &[Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::Int8 { group: 16 }], true);
        check_alone(&case, &check(&case));
    }
}

/// What many models at one depth are, or many adapters: a row or a few of each, layers of one format and of shapes of their own.
#[test]
fn many_runs_of_few_rows_have_the_bits_of_each_run_alone() {
    let mut random = Random(9);
    let (whole, odd) = (Dtype::Int4 { group: 128 }, Dtype::Int4Minimum { group: 16 });
    let kinds = [whole, INT8, Dtype::Q4_1, Dtype::Int1 { group: 64 }, odd, Dtype::Bf16, Dtype::F16];
    let columns = [[512, 1024], [96, 1056], [544, 32], [512, 200], [64, 512], [600, 16], [4, 64]];
    for (dtype, columns) in kinds.into_iter().zip(columns) {
        for row_counts in [&[1][..], &[1, 0, 3, 9, 16, 17]] {
            let run = |i: usize| {
                let (cols, rows) = (random.pick(&columns), random.pick(&[16, 16, 5, 40]));
                let bias = i.is_multiple_of(3).then(|| random.tame(rows));
                let parts = vec![random.tensor(dtype, rows, cols)];
                Run { parts, gaps: None, is_diagonal: false, bias, skip: i % 7 / 6, row_count: row_counts[i % row_counts.len()] }
            };
            let runs: Vec<_> = (0..24).map(run).collect();
            let rows: usize = runs.iter().map(|run| run.skip + run.row_count).sum();
            let (inputs, outputs) = (columns[0].max(columns[1]), 40);
            let inputs = Columns { stride: inputs + 9, offset: 8, width: inputs };
            let outputs = Columns { stride: outputs + 5, offset: 3, width: outputs };
            let (x, out) = (random.wild(rows, inputs.stride), random.wild(rows, outputs.stride));
            let finish = if row_counts.len() == 1 { Finish::Add } else { Finish::Store };
            let case = RunsCase { x, inputs, out, outputs, runs, finish, bf16_compute: Bf16Compute::F32 };
            check_alone(&case, &check(&case));
        }
    }
}

#[test]
fn no_runs_change_nothing() {
    let dense = Columns::dense(3);
    let case = RunsCase {
        x: vec![1.0; 3],
        inputs: dense,
        out: vec![2.0; 3],
        outputs: dense,
        runs: Vec::new(),
        finish: Finish::Add,
        bf16_compute: Bf16Compute::F32,
    };
    assert_eq!(check(&case), [2.0; 3]);
}

#[test]
#[should_panic(expected = "disjoint, ascending rows")]
fn runs_that_share_a_row_are_refused() {
    let cpu = &backends()[0];
    let weights = Random(1).tensor(Dtype::F32, 2, 3);
    let linear = cpu.linear(&[weights.view()]).unwrap();
    let (x, mut out) = (upload(cpu, &[0.0; 9]), upload(cpu, &[0.0; 6]));
    let run = |rows| LinearRun { linear: &linear, bias: None, rows };
    cpu.linear_runs(&mut out, Columns::dense(2), &x, Columns::dense(3), &[run(0..2), run(1..3)], Finish::Store);
}

#[test]
fn placed_parts_that_share_an_output_are_refused() {
    let weights = Random(1).tensor(Dtype::F32, 4, 3);
    let part = |first_output| PlacedPart { weights: weights.view(), first_input: 0, first_output };
    let cpu = &backends()[0];
    assert!(cpu.linear_placed(&[part(0), part(4)]).is_ok());
    assert!(cpu.linear_placed(&[part(0), part(3)]).is_err());
    assert!(Reference::default().linear_placed(&[part(5), part(0)]).is_err());
    assert!(cpu.linear_placed(&[]).is_err());
}
