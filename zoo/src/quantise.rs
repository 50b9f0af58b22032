//! Storing a model's matrices in fewer bits (docs/quantize.md). Here are recipes, grids and scales chosen by least error, and the draft of a
//! chain that is stored like an add. What needs activations is `ashlar_executor::model::calibrate`. Start with [`Draft`].

mod draft;
mod fp8;
mod grid;
mod planar;
mod recipe;

pub use draft::Draft;
pub use grid::{Grid, Levels};
pub use planar::{PlanarRows, round};
pub use recipe::{Form, Recipe, UnknownForm};
