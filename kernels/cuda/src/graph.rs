//! Launches as a graph of the driver's: one call for a whole step.

use std::collections::BTreeMap;

use cudarc::driver::result;
use cudarc::driver::sys;

use crate::card::{Card, lost, places};
use crate::driver::{DriverError, Launch, Recording};

/// A graph of kernels, each after the one before it, ready to run.
pub(crate) struct Graph {
    graph: sys::CUgraph,
    ready: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
}

// SAFETY: the driver's handles may be used from any thread, one at a time, which the lock around all graphs sees to.
unsafe impl Send for Graph {}

/// All graphs of a card.
#[derive(Default)]
pub(crate) struct Graphs {
    graphs: BTreeMap<Recording, Graph>,
    next: u64,
}

impl Graphs {
    pub(crate) fn add(&mut self, graph: Graph) -> Recording {
        let recording = Recording(self.next);
        self.next += 1;
        self.graphs.insert(recording, graph);
        recording
    }

    pub(crate) fn of(&mut self, recording: Recording) -> &mut Graph {
        self.graphs.get_mut(&recording).expect("recordings are used until they are forgotten")
    }

    pub(crate) fn take(&mut self, recording: Recording) -> Graph {
        self.graphs.remove(&recording).expect("recordings are forgotten once")
    }
}

/// What the driver takes of a launch. It copies what `arguments` point to before the call returns.
fn parameters(
    card: &Card,
    launch: &Launch<'_>,
    arguments: &mut [*mut std::ffi::c_void],
) -> Result<sys::CUDA_KERNEL_NODE_PARAMS, DriverError> {
    let [x, y, z] = launch.grid;
    Ok(sys::CUDA_KERNEL_NODE_PARAMS {
        func: card.kernel_for(launch)?,
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared_bytes,
        kernelParams: arguments.as_mut_ptr(),
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    })
}

impl Graph {
    /// The card's context is this thread's.
    pub(crate) fn new(card: &Card, launches: &[Launch<'_>]) -> Result<Self, DriverError> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the target is ours.
        unsafe { sys::cuGraphCreate(&mut graph, 0) }.result().map_err(lost("cuGraphCreate"))?;
        let mut made = Self { graph, ready: std::ptr::null_mut(), nodes: Vec::with_capacity(launches.len()) };
        match made.fill(card, launches) {
            Ok(()) => Ok(made),
            Err(error) => {
                // What it was for failed: that is what is told.
                let _ = made.destroy();
                Err(error)
            }
        }
    }

    fn fill(&mut self, card: &Card, launches: &[Launch<'_>]) -> Result<(), DriverError> {
        for launch in launches {
            let mut arguments = places(launch);
            let parameters = parameters(card, launch, &mut arguments)?;
            let (before, count) = self.nodes.last().map_or((std::ptr::null(), 0), |node| (std::ptr::from_ref(node), 1));
            let mut node = std::ptr::null_mut();
            // SAFETY: graph and node are the driver's, the kernel is of a module that stays, and its arguments are copied before the call returns.
            unsafe { sys::cuGraphAddKernelNode_v2(&mut node, self.graph, before, count, &parameters) }
                .result()
                .map_err(lost("cuGraphAddKernelNode"))?;
            self.nodes.push(node);
        }
        // SAFETY: the graph is whole.
        self.ready =
            unsafe { result::graph::instantiate(self.graph, sys::CUgraphInstantiate_flags(0)) }.map_err(lost("cuGraphInstantiate"))?;
        Ok(())
    }

    pub(crate) fn amend(&mut self, card: &Card, place: usize, launch: &Launch<'_>) -> Result<(), DriverError> {
        let mut arguments = places(launch);
        let parameters = parameters(card, launch, &mut arguments)?;
        // SAFETY: the node is of the graph that was made ready, and the arguments are copied before the call returns.
        unsafe { sys::cuGraphExecKernelNodeSetParams_v2(self.ready, self.nodes[place], &parameters) }
            .result()
            .map_err(lost("cuGraphExecKernelNodeSetParams"))
    }

    pub(crate) fn launch(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the graph is ready; addresses among its arguments are of memory that is given back in order.
        unsafe { result::graph::launch(self.ready, stream) }.map_err(lost("cuGraphLaunch"))
    }

    pub(crate) fn destroy(self) -> Result<(), DriverError> {
        if !self.ready.is_null() {
            // SAFETY: it is the driver's, and nobody uses it any more.
            unsafe { result::graph::exec_destroy(self.ready) }.map_err(lost("cuGraphExecDestroy"))?;
        }
        // SAFETY: likewise.
        unsafe { result::graph::destroy(self.graph) }.map_err(lost("cuGraphDestroy"))
    }
}
