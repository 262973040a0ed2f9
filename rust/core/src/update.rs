//! Optimizer updates: parameters and their states → the same, one step on, by their gradients.

use crate::blocks::{Block, Cut};
use crate::dtype::{Bf16, Dtype, Element, F16};
use crate::error::{Problem, TensorError};
use crate::isa::Isa;
use crate::kernels::{GATHER, Update};
use crate::memory;
use crate::overlap;
use crate::team::Team;
use crate::view::View;

/// The most states that a parameter may have.
const MOST_STATES: usize = 4;

/// The tensors of an optimizer's step: parameters, each with its states and its gradient. That parameters and states may be written was
/// checked when the list was made.
#[derive(Debug)]
pub struct Parameters {
    /// Each parameter, followed by its states and its gradient.
    views: Vec<View>,
    /// Where each parameter stands in `views`, and the end.
    starts: Vec<usize>,
    cut: Cut,
    bytes: usize,
}

impl Parameters {
    /// The list of these parameters. `views` holds each parameter, followed by its states and its gradient, all in the order of the parameter
    /// (see [`View::in_order_of`]); `states` says how many states each has.
    ///
    /// # Errors
    /// The first tensor at fault, by its index in `views`: one that is complex, and a parameter or state that cannot be written in place or
    /// shares memory with any other tensor. Gradients may share memory among themselves.
    ///
    /// # Panics
    /// If a parameter has more than four states, the tensors of a parameter are not all of its element type and length, or the numbers of
    /// states do not fit the number of views.
    pub fn new(views: Vec<View>, states: impl IntoIterator<Item = usize>) -> Result<Self, TensorError> {
        let mut starts = vec![0];
        let mut is_gradient = vec![false; views.len()];
        for states in states {
            assert!(states <= MOST_STATES, "{states} states of a parameter");
            let (start, gradient) = (starts[starts.len() - 1], starts[starts.len() - 1] + states + 1);
            is_gradient[gradient] = true;
            let kind = |view: &View| (view.dtype(), view.len());
            assert!(views[start..=gradient].iter().all(|view| kind(view) == kind(&views[start])), "tensors of different types or lengths");
            starts.push(gradient + 1);
        }
        assert_eq!(starts.last(), Some(&views.len()), "views that belong to no parameter");
        if let Some(index) = views.iter().position(|view| view.dtype().is_complex()) {
            return Err(TensorError { index, problem: Problem::Complex });
        }
        overlap::check_writable(&views, &overlap::by_address(&views), |index| !is_gradient[index])?;
        let cut = Cut::new(starts[..starts.len() - 1].iter().map(|&start| views[start].len()));
        let bytes = views.iter().map(View::bytes).fold(0, usize::saturating_add);
        Ok(Self { views, starts, cut, bytes })
    }

    /// The views as they were given.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// A parameter, its states and its gradient.
    fn tensors(&self, parameter: usize) -> &[View] {
        &self.views[self.starts[parameter]..self.starts[parameter + 1]]
    }
}

/// Takes one step, each parameter by the formula that `update_of` gives for its place in the list.
///
/// The result has the same bits for any team.
///
/// # Safety
/// Nobody else reads or writes parameters and states, and nobody writes gradients, until this returns.
pub unsafe fn update<U: Update>(parameters: &Parameters, update_of: impl Fn(usize) -> U + Sync, team: Team) {
    let team = team.for_bytes(parameters.bytes);
    let pieces = parameters.cut.pieces();
    team.run(pieces, |piece| {
        // From the end: what the norm has read last is still in cache.
        for block in parameters.cut.piece(pieces - 1 - piece) {
            update_block(parameters.tensors(block.tensor), block, update_of(block.tensor), team.isa);
        }
    });
}

fn update_block<U: Update>(tensors: &[View], block: Block, update: U, isa: Isa) {
    match tensors[0].dtype() {
        Dtype::F16 => update_real::<U, F16>(tensors, block, update, isa),
        Dtype::Bf16 => update_real::<U, Bf16>(tensors, block, update, isa),
        Dtype::F32 => update_real::<U, f32>(tensors, block, update, isa),
        Dtype::F64 => update_real::<U, f64>(tensors, block, update, isa),
        Dtype::C64 | Dtype::C128 => {} // refused by `Parameters::new`
    }
}

fn update_real<U: Update, E: Element>(tensors: &[View], block: Block, update: U, isa: Isa) {
    let [parameter, states @ .., gradient] = tensors else { return };
    if let (Some(x), Some(g)) = (memory::contiguous::<E>(parameter, block), memory::slice::<E>(gradient, block))
        && states.iter().all(|state| memory::contiguous::<E>(state, block).is_some())
    {
        let mut slices: [&mut [E]; MOST_STATES] = Default::default();
        for (slice, state) in slices.iter_mut().zip(states.iter().filter_map(|state| memory::contiguous::<E>(state, block))) {
            // SAFETY: as for the parameter.
            *slice = unsafe { &mut *state };
        }
        // SAFETY: the maker of the views vouches for the memory. Parameters and states share no memory with any other tensor, each block is
        // claimed by one thread, and the caller of `update` keeps everybody else out.
        return update.apply(isa, unsafe { &mut *x }, &mut slices[..states.len()], g);
    }
    let mut buffers = vec![vec![E::default(); GATHER.min(block.count)]; tensors.len()];
    for position in (0..block.count).step_by(GATHER) {
        let (first, count) = (block.first + position, (block.count - position).min(GATHER));
        for (view, buffer) in tensors.iter().zip(&mut buffers) {
            memory::load(view, first, &mut buffer[..count]);
        }
        let [x, vs @ .., g] = &mut buffers[..] else { return };
        let mut slices: [&mut [E]; MOST_STATES] = Default::default();
        for (slice, v) in slices.iter_mut().zip(vs) {
            *slice = &mut v[..count];
        }
        update.apply(isa, &mut x[..count], &mut slices[..states.len()], &g[..count]);
        for (view, buffer) in tensors[..=states.len()].iter().zip(&buffers) {
            // SAFETY: as above.
            unsafe { memory::store(view, first, &buffer[..count]) };
        }
    }
}
