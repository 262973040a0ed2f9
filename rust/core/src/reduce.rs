//! Tensors → totals: reading.

use std::sync::Arc;

use crate::blocks::{Block, Tensors};
use crate::dtype::{Bf16, Dtype, Element, F16};
use crate::isa::Isa;
use crate::kernels::{self, GATHER, Kernel};
use crate::memory;
use crate::moments::Merge;
use crate::pool::Team;
use crate::view::View;

/// One total for each tensor. A tensor that repeats an earlier one has the empty total.
///
/// The result has the same bits for any team.
pub fn reduce<K: Kernel>(tensors: &Arc<Tensors>, kernel: K, team: Team) -> Vec<K::Total> {
    let team = team.for_bytes(tensors.bytes());
    let shared = Arc::clone(tensors);
    let spans = team.map(tensors.cut().spans(), move |span| {
        let blocks = shared.cut().span(span);
        blocks.iter().map(|block| reduce_block(&shared.views()[block.tensor], *block, kernel, team.isa)).collect::<Vec<_>>()
    });
    let mut totals = vec![K::Total::EMPTY; tensors.views().len()];
    for (block, total) in tensors.cut().blocks().iter().zip(spans.iter().flatten()) {
        totals[block.tensor].merge(total);
    }
    totals
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

/// The real numbers of a block: its elements, or the parts of complex ones.
fn elements<E: Element>(view: &View, block: Block, isa: Isa) -> kernels::Block<'_, E> {
    match memory::slice::<E>(view, block) {
        Some(slice) => kernels::Block::slice(isa, slice),
        None => {
            let parts = view.dtype().parts();
            kernels::Block::gather(isa, block.count * parts, move |position, buffer| {
                memory::load(view, block.first + position / parts, buffer);
            })
        }
    }
}

/// The absolute values of a block of complex numbers.
fn moduli<E: Element>(view: &View, block: Block, isa: Isa) -> kernels::Block<'_, f64> {
    kernels::Block::gather(isa, block.count, move |position, moduli| {
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
