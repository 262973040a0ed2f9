//! Tensors → totals.

use crate::blocks::{Block, Cut, USUAL};
use crate::dtype::{Bf16, Dtype, Element, F16};
use crate::error::room;
use crate::isa::Isa;
use crate::kernels::{Elements, GATHER, Kernel};
use crate::memory;
use crate::moments::Merge;
use crate::team::Team;
use crate::tensors::Tensors;
use crate::view::View;

/// One total for each tensor. A tensor that repeats an earlier one has the empty total.
///
/// The result has the same bits for any team.
pub fn reduce<K: Kernel>(tensors: &Tensors, kernel: K, team: Team) -> Vec<K::Total> {
    let mut totals = room(tensors.views().len());
    totals.resize(tensors.views().len(), K::Total::EMPTY);
    reduce_each(tensors, kernel, team, |tensor, total| totals[tensor] = *total);
    totals
}

/// The total of all tensors: the totals that [`reduce()`] gives, merged in order.
pub fn reduce_all<K: Kernel>(tensors: &Tensors, kernel: K, team: Team) -> K::Total {
    let mut all = K::Total::EMPTY;
    reduce_each(tensors, kernel, team, |_, total| all.merge(total));
    all
}

/// Calls `take` with the index and the total of each tensor, in order, but for tensors that repeat earlier ones or have no elements.
pub fn reduce_each<K: Kernel>(tensors: &Tensors, kernel: K, team: Team, mut take: impl FnMut(usize, &K::Total)) {
    let team = team.for_bytes(tensors.bytes());
    let read = |block: Block| reduce_block(&tensors.views()[block.tensor], block, kernel, team.isa);
    let (mut latest, mut total) = (None, K::Total::EMPTY);
    each_block(tensors.cut(), team, read, |tensor, block| {
        if latest != Some(tensor) {
            if let Some(done) = latest.replace(tensor) {
                take(done, &total);
            }
            total = K::Total::EMPTY;
        }
        total.merge(block);
    });
    if let Some(done) = latest {
        take(done, &total);
    }
}

/// Calls `read` for each block, on any thread, and `take` with the tensor of the block and what `read` has returned, on this thread and in
/// order.
pub(crate) fn each_block<T: Send>(cut: &Cut, team: Team, read: impl Fn(Block) -> T + Sync, mut take: impl FnMut(usize, &T)) {
    let mut watch = team.watch();
    if team.is_alone() {
        return Team::alone(cut.pieces(), &mut watch, |piece| cut.piece(piece).for_each(|block| take(block.tensor, &read(block))));
    }
    /// Pieces whose results are kept at a time.
    const ROUND: usize = 512;
    for begin in (0..cut.pieces()).step_by(ROUND) {
        let pieces = ROUND.min(cut.pieces() - begin);
        let results = team.map(pieces, &mut watch, |piece| {
            let mut results = Vec::with_capacity(USUAL);
            results.extend(cut.piece(begin + piece).map(|block| (block.tensor, read(block))));
            results
        });
        results.iter().flatten().for_each(|(tensor, result)| take(*tensor, result));
    }
}

fn reduce_block<K: Kernel>(view: &View, block: Block, kernel: K, isa: Isa) -> K::Total {
    match view.dtype() {
        Dtype::F16 => kernel.block(&elements::<F16>(view, block, isa)),
        Dtype::Bf16 => kernel.block(&elements::<Bf16>(view, block, isa)),
        Dtype::F32 => kernel.block(&elements::<f32>(view, block, isa)),
        Dtype::F64 => kernel.block(&elements::<f64>(view, block, isa)),
        Dtype::C64 if K::READS_PARTS => kernel.block(&elements::<f32>(view, block, isa)),
        Dtype::C128 if K::READS_PARTS => kernel.block(&elements::<f64>(view, block, isa)),
        Dtype::C64 => kernel.block(&moduli::<f32>(view, block, isa)),
        Dtype::C128 => kernel.block(&moduli::<f64>(view, block, isa)),
    }
}

/// The real numbers of a block: its elements, or the parts of complex elements.
fn elements<E: Element>(view: &View, block: Block, isa: Isa) -> Elements<'_, E> {
    match memory::slice::<E>(view, block) {
        Some(slice) => Elements::slice(isa, slice),
        None => {
            let parts = view.dtype().parts();
            Elements::gather(isa, block.count * parts, move |position, buffer| {
                memory::load(view, block.first + position / parts, buffer);
            })
        }
    }
}

/// The absolute values of a block of complex numbers.
fn moduli<E: Element>(view: &View, block: Block, isa: Isa) -> Elements<'_, f64> {
    Elements::gather(isa, block.count, move |position, moduli| {
        let mut parts = [E::default(); 2 * GATHER];
        let parts = &mut parts[..2 * moduli.len()];
        memory::load(view, block.first + position, parts);
        for (modulus, pair) in moduli.iter_mut().zip(parts.as_chunks::<2>().0) {
            *modulus = hypot(pair[0].wide(), pair[1].wide());
        }
    })
}

/// √(a² + b²) without overflow, by the same operations on every machine. NaN if either is.
fn hypot(a: f64, b: f64) -> f64 {
    let (a, b) = (a.abs(), b.abs());
    let (large, small) = if a > b { (a, b) } else { (b, a) };
    if large == 0.0 || large == f64::INFINITY {
        return large + small;
    }
    let ratio = small / large;
    large * (1.0 + ratio * ratio).sqrt()
}
