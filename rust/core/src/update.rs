//! Parameters, their gradients and momentum buffers → the parameters and buffers, one step on.

use crate::blocks::{Block, Cut};
use crate::dtype::{Bf16, Dtype, Element, F16};
use crate::error::{Problem, TensorError};
use crate::isa::Isa;
use crate::kernels::{Descend, GATHER};
use crate::memory;
use crate::overlap;
use crate::pool::Team;
use crate::view::View;

/// Parameters, each with its buffer and its gradient, which [`View::together`] has described. Where there is no momentum
/// [`View::none`] stands for the buffer.
#[derive(Debug)]
pub struct Updates {
    triples: Vec<[View; 3]>,
    cut: Cut,
    bytes: usize,
}

impl Updates {
    /// Cuts up the parameters.
    ///
    /// # Errors
    /// The first tensor at fault, by its place among all: one that is complex, and a parameter or buffer that cannot be written in place or
    /// shares memory with any other tensor.
    ///
    /// # Panics
    /// If the tensors of a parameter are not of its element type and length.
    pub fn new(triples: Vec<[View; 3]>) -> Result<Self, TensorError> {
        for [parameter, buffer, gradient] in &triples {
            let fits = |view: &View| (view.dtype(), view.len()) == (parameter.dtype(), parameter.len());
            assert!(fits(gradient) && (buffer.is_empty() || fits(buffer)), "tensors of different types or lengths");
        }
        let views = triples.as_flattened();
        if let Some(index) = views.iter().position(|view| view.dtype().is_complex()) {
            return Err(TensorError { index, problem: Problem::Complex });
        }
        overlap::check_writable(views, &overlap::by_address(views), |index| index % 3 != 2)?;
        let cut = Cut::new(triples.iter().map(|[parameter, ..]| parameter.len()));
        let bytes = views.iter().map(View::bytes).fold(0, usize::saturating_add);
        Ok(Self { triples, cut, bytes })
    }

    /// The parameters as they were given.
    pub fn triples(&self) -> &[[View; 3]] {
        &self.triples
    }
}

/// Takes one step, of each parameter by the numbers that belong to its place.
///
/// The result has the same bits for any team.
///
/// # Safety
/// Nobody else uses the memory of the tensors meanwhile.
pub unsafe fn update(updates: &Updates, numbers_of: impl Fn(usize) -> Descend + Sync, team: Team) {
    let team = team.for_bytes(updates.bytes).to_the_end();
    let pieces = updates.cut.pieces();
    team.map(pieces, |piece| {
        // From the end: what the norm has read last is still in the cache.
        for block in updates.cut.piece(pieces - 1 - piece) {
            update_block(&updates.triples[block.tensor], block, numbers_of(block.tensor), team.isa);
        }
    });
}

fn update_block(triple: &[View; 3], block: Block, numbers: Descend, isa: Isa) {
    match triple[0].dtype() {
        Dtype::F16 => update_real::<F16>(triple, block, numbers, isa),
        Dtype::Bf16 => update_real::<Bf16>(triple, block, numbers, isa),
        Dtype::F32 => update_real::<f32>(triple, block, numbers, isa),
        Dtype::F64 => update_real::<f64>(triple, block, numbers, isa),
        Dtype::C64 | Dtype::C128 => {} // refused by `Updates::new`
    }
}

fn update_real<E: Element>([parameter, buffer, gradient]: &[View; 3], block: Block, numbers: Descend, isa: Isa) {
    let momentum = !buffer.is_empty();
    if let (Some(x), Some(v), Some(g)) = (
        memory::contiguous::<E>(parameter, block),
        if momentum { memory::contiguous::<E>(buffer, block).map(Some) } else { Some(None) },
        memory::slice::<E>(gradient, block),
    ) {
        // SAFETY: parameters and buffers overlap nothing, blocks are claimed by one thread each, and `update`'s caller keeps all others out.
        let (x, v) = unsafe { (&mut *x, v.map(|v| &mut *v)) };
        return numbers.apply(isa, x, v, g);
    }
    let [mut x, mut v, mut g] = [[E::default(); GATHER]; 3];
    for position in (0..block.count).step_by(GATHER) {
        let (first, count) = (block.first + position, (block.count - position).min(GATHER));
        let (x, v, g) = (&mut x[..count], &mut v[..count], &mut g[..count]);
        memory::load(parameter, first, x);
        memory::load(gradient, first, g);
        if momentum {
            memory::load(buffer, first, v);
        }
        numbers.apply(isa, x, momentum.then_some(&mut *v), g);
        // SAFETY: as above.
        unsafe {
            memory::store(parameter, first, x);
            if momentum {
                memory::store(buffer, first, v);
            }
        }
    }
}
