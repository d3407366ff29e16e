//! Ops that are recorded once as a CUDA graph and replayed after.

use cudarc::driver::CudaGraph;

use super::device::Gpu;
use super::error::{CudaError, Result, driver};

/// Recorded ops, to run again over the same buffers.
struct Graph {
    graph: CudaGraph,
    gpu: Gpu,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

// SAFETY: a graph may be launched from any thread that uses its device, which `launch` ensures; launching needs `&mut`.
unsafe impl Send for Graph {}
// SAFETY: the only use of a shared graph is to format it.
unsafe impl Sync for Graph {}

impl Graph {
    /// Records the ops that `queue` queues instead of running them. They must not wait for the device, and what they use
    /// must have been used before: kernels are compiled, algorithms of products chosen. Their buffers must live as long as
    /// the graph.
    fn record<E: From<CudaError>>(
        gpu: &Gpu,
        queue: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<Graph, E> {
        Ok(Graph { graph: gpu.stream().record(queue)?, gpu: gpu.clone() })
    }

    fn launch(&mut self) -> Result<()> {
        self.gpu.stream().bind()?;
        self.graph.launch().map_err(driver("running a graph"))
    }
}

/// A graph with the buffers it works on. [`Recorded::run`] records its ops at the second call and replays them at every
/// later one. Ops that cannot be recorded are queued one by one at every call.
#[derive(Debug, Default)]
pub struct Recorded<W> {
    /// Buffers that the ops use. None of them may be replaced once the ops are recorded, as a graph names their addresses.
    pub work: W,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing has run.
    #[default]
    New,
    /// Kernels are compiled and algorithms of products chosen.
    Ready,
    Recorded(Graph),
    /// The driver refused to record.
    Refused,
}

impl<W> Recorded<W> {
    /// Holds `work`, with nothing recorded.
    pub fn new(work: W) -> Recorded<W> {
        Recorded { work, state: State::New }
    }

    /// Runs the ops that `queue` queues over the work. Every call must queue the same ops as the first one since
    /// [`Recorded::forget`].
    ///
    /// # Errors
    /// Those of `queue`; the device fails.
    pub fn run<E: From<CudaError>>(
        &mut self,
        gpu: &Gpu,
        mut queue: impl FnMut(&mut W) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let work = &mut self.work;
        match &mut self.state {
            State::Recorded(graph) => Ok(graph.launch()?),
            State::Refused => queue(work),
            State::New => {
                queue(work)?;
                self.state = State::Ready;
                Ok(())
            }
            State::Ready => match Graph::record(gpu, || queue(work)) {
                Ok(mut graph) => {
                    graph.launch()?;
                    self.state = State::Recorded(graph);
                    Ok(())
                }
                Err(_) => {
                    // If the ops themselves fail, they report it now.
                    self.state = State::Refused;
                    queue(work)
                }
            },
        }
    }

    /// Tells whether the ops are replayed.
    pub fn is_recorded(&self) -> bool {
        matches!(self.state, State::Recorded(_))
    }

    /// Forgets what was recorded; the work may then change.
    pub fn forget(&mut self) {
        self.state = State::New;
    }
}
