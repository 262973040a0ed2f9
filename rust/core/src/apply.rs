//! Tensors → the same tensors, changed in place.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::blocks::Block;
use crate::dtype::{Bf16, Dtype, Element, F16};
use crate::error::room;
use crate::isa::Isa;
use crate::kernels::{GATHER, Map};
use crate::memory;
use crate::team::Team;
use crate::tensors::WritableTensors;
use crate::view::View;

/// Changes every element, each once, and returns the indices of the tensors in which something was written.
///
/// # Safety
/// Nobody else reads or writes the memory of the tensors until this returns.
pub unsafe fn apply<M: Map>(tensors: &WritableTensors, map: M, team: Team) -> Vec<usize> {
    // SAFETY: the caller's promise.
    unsafe { apply_each(tensors, move |_| Some(map), team) }
}

/// As [`apply()`], with a map for each tensor, or none to leave it alone.
///
/// # Safety
/// As for [`apply()`].
pub unsafe fn apply_each<M: Map>(tensors: &WritableTensors, map_of: impl Fn(usize) -> Option<M> + Sync, team: Team) -> Vec<usize> {
    let team = team.for_bytes(tensors.bytes());
    let (cut, views) = (tensors.cut(), tensors.views());
    let pieces = cut.pieces();
    let mut changed: Vec<AtomicBool> = room(views.len());
    changed.resize_with(views.len(), AtomicBool::default);
    team.run(pieces, |piece| {
        // From the end: what a measurement has read last is still in cache.
        for block in cut.piece(pieces - 1 - piece) {
            if map_of(block.tensor).is_some_and(|map| apply_block(&views[block.tensor], block, map, team.isa)) {
                changed[block.tensor].store(true, Ordering::Relaxed);
            }
        }
    });
    changed.into_iter().enumerate().filter_map(|(index, changed)| changed.into_inner().then_some(index)).collect()
}

fn apply_block<M: Map>(view: &View, block: Block, map: M, isa: Isa) -> bool {
    match view.dtype() {
        Dtype::F16 => apply_real::<M, F16>(view, block, map, isa),
        Dtype::Bf16 => apply_real::<M, Bf16>(view, block, map, isa),
        Dtype::F32 | Dtype::C64 => apply_real::<M, f32>(view, block, map, isa),
        Dtype::F64 | Dtype::C128 => apply_real::<M, f64>(view, block, map, isa),
    }
}

fn apply_real<M: Map, E: Element>(view: &View, block: Block, map: M, isa: Isa) -> bool {
    if let Some(numbers) = memory::contiguous::<E>(view, block) {
        // SAFETY: the maker of the view vouches for the memory. Blocks of `WritableTensors` do not overlap, each is claimed by one thread, and
        // the caller of `apply` keeps everybody else out.
        return map.apply(isa, unsafe { &mut *numbers });
    }
    let parts = view.dtype().parts();
    let mut buffer = [E::default(); GATHER];
    let mut changed = false;
    for position in (0..block.count).step_by(GATHER / parts) {
        let part = &mut buffer[..parts * (block.count - position).min(GATHER / parts)];
        memory::load(view, block.first + position, part);
        if map.apply(isa, part) {
            changed = true;
            // SAFETY: as above.
            unsafe { memory::store(view, block.first + position, part) };
        }
    }
    changed
}
