//! Fuzz targets as ordinary functions; `tests/smoke.rs` mutates the corpus against each for a few seconds.
