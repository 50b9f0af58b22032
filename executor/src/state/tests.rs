//! The engine against a modelled device (`device`), driven event by event (`node`).

mod abreast;
mod adapters;
mod affinity;
mod any;
mod boundary;
mod device;
mod fairness;
mod flight;
mod links;
mod node;
mod profiles;
mod recut;
mod regroup;
mod serving;
mod shares;
mod targets;
mod time;
mod windows;

/// A family: shared trunk, own tops, one unrelated chain. 2000 is embed, 2001 head.
fn family() -> Vec<Vec<u32>> {
    vec![
        vec![2000, 1, 1001, 2, 1002, 3, 1003, 2001],
        vec![2000, 1, 1001, 2, 1002, 13, 1003, 2001],
        vec![2000, 1, 1001, 22, 1002, 3, 1003, 2001],
        vec![2100, 31, 1031, 32, 1032, 2101],
    ]
}

/// Blocks of the family that are alike: attention, feed-forward, embed and head.
fn form(block: u32) -> u32 {
    match block {
        0..1000 => 0,
        1000..2000 => 1,
        _ => 2 + block % 2,
    }
}

/// What adapters change in the chains of the family, by place: nothing; all, in two ways; what lies above the first blocks; one block.
const CHANGES: [&[(u32, u64)]; 5] =
    [&[], &[(1, 71), (2, 72), (3, 73), (4, 74)], &[(1, 81), (2, 82), (3, 83), (4, 84)], &[(3, 93), (4, 94)], &[(2, 95)]];

/// The family with windows: in no attention block, in all, in every other one, or in those of the upper half.
fn family_with(windows: Windows) -> Vec<Vec<u32>> {
    let has_window = |i: usize, count: usize| match windows {
        Windows::None => false,
        Windows::All => true,
        Windows::EveryOther => (i / 2).is_multiple_of(2),
        Windows::UpperHalf => i > count / 2,
    };
    let with = |chain: Vec<u32>| -> Vec<u32> {
        let count = chain.len();
        let windowed = |(i, block): (usize, u32)| if block < 1000 && has_window(i, count) { device::WINDOW_FROM + block } else { block };
        chain.into_iter().enumerate().map(windowed).collect()
    };
    family().into_iter().map(with).collect()
}

/// Which attention blocks have a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Windows {
    None,
    All,
    EveryOther,
    UpperHalf,
}

impl Windows {
    const ALL: [Self; 4] = [Self::None, Self::All, Self::EveryOther, Self::UpperHalf];
}
