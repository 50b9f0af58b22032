//! The engine against a modelled device (`device`), driven event by event (`node`).

mod any;
mod boundary;
mod device;
mod fairness;
mod flight;
mod links;
mod node;
mod recut;
mod serving;
mod targets;
mod time;

/// A family: shared trunk, own tops, one unrelated chain. 2000 is embed, 2001 head.
fn family() -> Vec<Vec<u32>> {
    vec![
        vec![2000, 1, 1001, 2, 1002, 3, 1003, 2001],
        vec![2000, 1, 1001, 2, 1002, 13, 1003, 2001],
        vec![2000, 1, 1001, 22, 1002, 3, 1003, 2001],
        vec![2100, 31, 1031, 32, 1032, 2101],
    ]
}
