//! Rows through linear layers by as few launches as there are formats: runs of few rows are tasks of one launch, whatever their shapes; a run of many rows is
//! launched alone, cut to what fits into scratch.

use ashlar_kernels::ops::{Activation, Finish};

use crate::Cuda;
use crate::arguments::NULL;
use crate::driver::{Address, Argument, DriverError};
use crate::linear::{Form, Linear, Most, Part, address};
use crate::task::{LinearTask, QuantiseTask, Task};
use crate::tiles::FEW_ROWS_MAX;

/// Bytes of scratch that rows of one launch take, at most: less than it has from the start, as nothing is taken of the card while it serves.
const BYTES_MAX: usize = 32 << 20;
/// Ctas along y and z, at most.
const GRID_MAX: usize = 65_535;
/// What places in scratch are aligned to.
const ALIGNMENT: usize = 256;

/// Rows through a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run<'a> {
    pub(crate) linear: &'a Linear,
    /// Its first row's first input, and first output.
    pub(crate) x: Address,
    pub(crate) out: Address,
    pub(crate) bias: Option<Address>,
    pub(crate) rows: usize,
}

/// Rows through a part of a layer.
#[derive(Debug, Clone, Copy)]
struct Piece<'a> {
    part: &'a Part,
    x: Address,
    out: Address,
    bias: Option<Address>,
    rows: usize,
}

/// Elements from row to row of what is read and written, and what becomes of outputs.
#[derive(Debug, Clone, Copy)]
struct Ends {
    x_stride: usize,
    out_stride: usize,
    finish: Finish,
}

/// An activation as the kernels count it.
pub(crate) fn activation_number(activation: Activation) -> Argument {
    Argument::Int(number(activation))
}

fn number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Relu => 3,
    }
}

impl Ends {
    /// `finish` as the kernels count it, and sides of outputs that they take.
    fn finish(self) -> (Argument, usize) {
        match self.finish {
            Finish::Store => (Argument::Int(0), 1),
            Finish::Add => (Argument::Int(1), 1),
            Finish::Gate(activation) => (Argument::Int(2 + number(activation)), 2),
        }
    }
}

fn elements(address: Address, count: usize) -> Address {
    address.plus(count * size_of::<f32>())
}

impl<'a> Run<'a> {
    fn pieces(self) -> impl Iterator<Item = Piece<'a>> {
        self.linear.parts().iter().map(move |part| Piece {
            part,
            x: elements(self.x, part.first_input),
            out: elements(self.out, part.first_output),
            bias: self.bias.map(|bias| elements(bias, part.first_output)),
            rows: self.rows,
        })
    }

    /// So many of its rows, from one on.
    fn cut(self, first: usize, rows: usize, ends: Ends) -> Self {
        Self { x: elements(self.x, first * ends.x_stride), out: elements(self.out, first * ends.out_stride), rows, ..self }
    }

    /// Bytes of scratch that so many of its rows take.
    fn bytes(&self, rows: usize) -> usize {
        let quantised = |part: &Part| part.quantised_bytes(rows).map_or(0, |bytes| bytes.map(aligned).iter().sum());
        self.linear.parts().iter().map(quantised).sum()
    }
}

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// Tasks of one kernel, and the pieces that they are of.
struct Batch<'a, T> {
    kernel: &'static str,
    tasks: Vec<(Piece<'a>, T)>,
}

/// Puts a task beside those of its kernel, or alone.
fn put<'a, T>(batches: &mut Vec<Batch<'a, T>>, kernel: &'static str, is_alone: bool, piece: Piece<'a>, task: T) {
    match batches.iter_mut().find(|batch| batch.kernel == kernel && !is_alone) {
        Some(batch) => batch.tasks.push((piece, task)),
        None => batches.push(Batch { kernel, tasks: vec![(piece, task)] }),
    }
}

/// Appends the tasks of batches that have several, each batch's place in bytes being returned; `None` where the task is passed by value.
fn list<T: Task>(batches: &[Batch<'_, T>], words: &mut Vec<u32>) -> Vec<Option<usize>> {
    let mut place = |batch: &Batch<'_, T>| {
        let at = size_of_val(words.as_slice());
        (batch.tasks.len() > 1).then(|| {
            batch.tasks.iter().for_each(|(_, task)| task.append(words));
            at
        })
    };
    batches.iter().map(&mut place).collect()
}

/// The first two arguments of kernels: the only task by value, and the list.
fn told<T: Task>(batch: &Batch<'_, T>, list: Address, at: Option<usize>) -> [Argument; 2] {
    [batch.tasks[0].1.argument(), at.map_or(NULL, |at| list.plus(at).into())]
}

impl Cuda {
    /// Rows through layers, each run's through its own, and what becomes of the outputs. Runs write to different rows.
    pub(crate) fn run_linears(&self, runs: &[Run<'_>], x_stride: usize, out_stride: usize, finish: Finish) -> Result<(), DriverError> {
        let ends = Ends { x_stride, out_stride, finish };
        let (mut together, mut bytes) = (Vec::new(), 0);
        for run in runs {
            if let (Finish::Gate(activation), false) = (finish, run.linear.gates()) {
                self.gate_beside(*run, ends, activation)?;
            } else if run.rows > FEW_ROWS_MAX {
                self.run_alone(*run, ends)?;
            } else {
                let more = run.bytes(run.rows);
                if bytes + more > BYTES_MAX || together.len() + run.linear.parts().len() > GRID_MAX {
                    self.launch_pieces(&together, false, ends)?;
                    together.clear();
                    bytes = 0;
                }
                together.extend(run.pieces());
                bytes += more;
            }
        }
        self.launch_pieces(&together, false, ends)
    }

    /// Many rows, as many at once as scratch takes.
    fn run_alone(&self, run: Run<'_>, ends: Ends) -> Result<(), DriverError> {
        let mut done = 0;
        while done < run.rows {
            let rows = rows_at_once(run.rows - done, |rows| run.bytes(rows));
            let cut = run.cut(done, rows, ends);
            self.launch_pieces(&cut.pieces().collect::<Vec<_>>(), true, ends)?;
            done += rows;
        }
        Ok(())
    }

    /// Where gate and up are not computed side by side: both are stored in scratch, then gated.
    fn gate_beside(&self, run: Run<'_>, ends: Ends, activation: Activation) -> Result<(), DriverError> {
        let (outputs, mut done) = (run.linear.outputs(), 0);
        let stored = |rows: usize| aligned(rows * outputs * size_of::<f32>());
        while done < run.rows {
            let rows = rows_at_once(run.rows - done, |rows| run.bytes(rows) + stored(rows));
            let cut = run.cut(done, rows, ends);
            let ([], mut scratch) = self.stage([], stored(rows) + cut.bytes(rows))?;
            let (beside, base) = (scratch.take(stored(rows)), scratch.take(cut.bytes(rows)));
            let store = Ends { out_stride: outputs, finish: Finish::Store, ..ends };
            let pieces: Vec<Piece<'_>> = Run { out: beside, ..cut }.pieces().collect();
            self.launch_batches(&Batches::new(&pieces, true), Address(0), base, store)?;
            let width = outputs / 2;
            let arguments = [cut.out.into(), beside.into(), width.into(), ends.out_stride.into(), activation_number(activation)];
            self.launch("gate_rows", [rows as u32, 1, 1], 256, 0, &arguments)?;
            done += rows;
        }
        Ok(())
    }

    /// Pieces of few rows together, a launch for each way in which rows are quantised and one for each format; or those of a run alone, a launch for each.
    fn launch_pieces(&self, pieces: &[Piece<'_>], is_alone: bool, ends: Ends) -> Result<(), DriverError> {
        let mut batches = Batches::new(pieces, is_alone);
        let words = batches.list();
        let (list, mut scratch) = if words.is_empty() {
            let ([], scratch) = self.stage([], batches.bytes)?;
            (Address(0), scratch)
        } else {
            let ([list], scratch) = self.stage([&words], batches.bytes)?;
            (list, scratch)
        };
        let base = scratch.take(batches.bytes);
        self.launch_batches(&batches, list, base, ends)
    }

    fn launch_batches(&self, batches: &Batches<'_>, list: Address, base: Address, ends: Ends) -> Result<(), DriverError> {
        for (batch, at) in std::iter::zip(&batches.quantise, &batches.quantise_at) {
            let shapes = batch.tasks.iter().map(|(piece, _)| piece.part.quantise());
            let (ctas, threads) = shapes.fold((0, 0), |(ctas, threads), (_, x, of)| (ctas.max(x), threads.max(of)));
            let rows = batch.tasks.iter().map(|(piece, _)| piece.rows).max().unwrap_or(0);
            let [one, list] = told(batch, list, *at);
            let arguments = [one, list, base.into(), ends.x_stride.into()];
            self.launch(batch.kernel, [ctas as u32, rows as u32, batch.tasks.len() as u32], threads, 0, &arguments)?;
        }
        let (finish, sides) = ends.finish();
        for (batch, at) in std::iter::zip(&batches.linear, &batches.linear_at) {
            let form = batch.tasks[0].0.part.form;
            let most = most(&batch.tasks, sides);
            let (kernel, grid, threads, shared) = form.shape(&most, sides, self.driver.shared_bytes_max());
            let [one, list] = told(batch, list, *at);
            let (x_stride, out_stride) = (Argument::from(ends.x_stride), Argument::from(ends.out_stride));
            match form {
                Form::Tiles(_) if most.rows > FEW_ROWS_MAX => {
                    self.launch(kernel, grid, threads, shared, &[one, base.into(), out_stride, finish])?;
                }
                Form::Plain(plain) if !plain.is_integer => {
                    // Rows lie where they are.
                    self.launch(kernel, grid, threads, shared, &[one, list, NULL, x_stride, out_stride, finish])?;
                }
                _ => self.launch(kernel, grid, threads, shared, &[one, list, base.into(), out_stride, finish])?,
            }
        }
        Ok(())
    }
}

/// So many rows that they fit.
fn rows_at_once(rows: usize, bytes: impl Fn(usize) -> usize) -> usize {
    let mut count = rows.min(GRID_MAX);
    while count > 1 && bytes(count) > BYTES_MAX {
        count /= 2;
    }
    count
}

fn most(tasks: &[(Piece<'_>, LinearTask)], sides: usize) -> Most {
    let none = Most { count: tasks.len(), rows: 0, width: 0, widths: 0, slices: 0, is_whole: true };
    tasks.iter().fold(none, |most, (Piece { part, rows, .. }, _)| {
        let width = part.outputs / sides;
        Most {
            rows: most.rows.max(*rows),
            width: most.width.max(width),
            widths: most.widths + width,
            slices: most.slices.max(part.slices()),
            is_whole: most.is_whole && part.inputs.is_multiple_of(ashlar_kernels::SLICE),
            ..most
        }
    })
}

/// Tasks by the kernels that take them.
struct Batches<'a> {
    quantise: Vec<Batch<'a, QuantiseTask>>,
    linear: Vec<Batch<'a, LinearTask>>,
    /// Where each one's list begins, if it is in a list.
    quantise_at: Vec<Option<usize>>,
    linear_at: Vec<Option<usize>>,
    /// Of all quantised rows.
    bytes: usize,
}

impl<'a> Batches<'a> {
    fn new(pieces: &[Piece<'a>], is_alone: bool) -> Self {
        let (mut quantise, mut linear, mut bytes) = (Vec::new(), Vec::new(), 0);
        for piece in pieces {
            let Piece { part, x, out, bias, rows } = *piece;
            let group = part.weights.group;
            let rows_at = match part.quantised_bytes(rows) {
                None => [x.0, 0, 0],
                Some(of) => {
                    let kernel = part.quantise().0;
                    quantised(&quantise, kernel, &QuantiseTask { x, to: [0; 3], rows, inputs: part.inputs, group }).unwrap_or_else(|| {
                        let to = of.map(|more| {
                            let at = bytes;
                            bytes += aligned(more);
                            at as u64
                        });
                        put(&mut quantise, kernel, is_alone, *piece, QuantiseTask { x, to, rows, inputs: part.inputs, group });
                        to
                    })
                }
            };
            let task = LinearTask {
                weights: part.weights.codes.address(),
                scales: address(&part.weights.scales),
                minima: address(&part.weights.minima),
                bias: bias.unwrap_or(Address(0)),
                rows_at,
                out,
                rows,
                outputs: part.outputs,
                inputs: part.inputs,
                group,
            };
            put(&mut linear, part.form.name(), is_alone, *piece, task);
        }
        let (quantise_at, linear_at) = (vec![None; quantise.len()], vec![None; linear.len()]);
        Self { quantise, linear, quantise_at, linear_at, bytes }
    }

    /// The tasks that are not passed by value.
    fn list(&mut self) -> Vec<u32> {
        let mut words = Vec::new();
        self.quantise_at = list(&self.quantise, &mut words);
        self.linear_at = list(&self.linear, &mut words);
        words
    }
}

/// Where the same rows were quantised in the same way.
fn quantised(batches: &[Batch<'_, QuantiseTask>], kernel: &str, task: &QuantiseTask) -> Option<[u64; 3]> {
    let is_same = |of: &QuantiseTask| (of.x, of.inputs, of.group, of.rows) == (task.x, task.inputs, task.group, task.rows);
    // A run's pieces follow each other: whoever shares rows is among the last.
    let latest = batches.iter().filter(|batch| batch.kernel == kernel).flat_map(|batch| batch.tasks.iter().rev().take(8));
    latest.map(|(_, of)| of).find(|of| is_same(of)).map(|of| of.to)
}
