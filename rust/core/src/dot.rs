//! Two lists of tensors, each a vector → their inner product and norms.

use crate::blocks::{Block, Cut};
use crate::dtype::{Bf16, Dtype, Element, F16};
use crate::isa::Isa;
use crate::kernels::{GATHER, Products, dot as dot_block};
use crate::memory;
use crate::moments::{Merge, merged};
use crate::reduce::each_block;
use crate::team::Team;
use crate::view::View;

/// Pairs of tensors of the same shape. The same pair of memory twice counts once.
#[derive(Debug)]
pub struct Pairs {
    pairs: Vec<[View; 2]>,
    cut: Cut,
    bytes: usize,
}

impl Pairs {
    /// The list of these pairs, the second of each in the order of the first (see [`View::in_order_of`]).
    pub fn new(mut pairs: Vec<[View; 2]>) -> Self {
        let mut seen = std::collections::HashSet::with_capacity(pairs.len());
        pairs.retain(|[x, y]| x.is_empty() || seen.insert((x.clone(), y.clone())));
        let cut = Cut::new(pairs.iter().map(|[x, _]| x.len()));
        let bytes = pairs.iter().flatten().map(View::bytes).fold(0, usize::saturating_add);
        Self { pairs, cut, bytes }
    }
}

/// Σxy, Σx² and Σy² over all pairs. For complex numbers Σxy is the real part of the inner product.
///
/// The result has the same bits for any team.
pub fn dot(pairs: &Pairs, team: Team) -> Products {
    let team = team.for_bytes(pairs.bytes);
    let mut products = Products::EMPTY;
    let read = |block: Block| reduce_pair(&pairs.pairs[block.tensor], block, team.isa);
    each_block(&pairs.cut, team, read, |_, block| products.merge(block));
    products
}

fn reduce_pair([x, y]: &[View; 2], block: Block, isa: Isa) -> Products {
    match (x.dtype(), y.dtype()) {
        (Dtype::F16, Dtype::F16) => alike::<F16>(x, y, block, isa),
        (Dtype::Bf16, Dtype::Bf16) => alike::<Bf16>(x, y, block, isa),
        (Dtype::F32, Dtype::F32) | (Dtype::C64, Dtype::C64) => alike::<f32>(x, y, block, isa),
        (Dtype::F64, Dtype::F64) | (Dtype::C128, Dtype::C128) => alike::<f64>(x, y, block, isa),
        _ => unlike(x, y, block, isa),
    }
}

/// Elements of the same type, read in place where both are contiguous.
fn alike<E: Element>(x: &View, y: &View, block: Block, isa: Isa) -> Products {
    match (memory::slice::<E>(x, block), memory::slice::<E>(y, block)) {
        (Some(x), Some(y)) => dot_block(isa, x, y),
        _ => in_pieces(x, y, block, isa, memory::load::<E>),
    }
}

/// Elements of two types, each widened to f64.
fn unlike(x: &View, y: &View, block: Block, isa: Isa) -> Products {
    in_pieces(x, y, block, isa, |view, first, buffer| match view.dtype() {
        Dtype::F16 => load_wide::<F16>(view, first, buffer),
        Dtype::Bf16 => load_wide::<Bf16>(view, first, buffer),
        Dtype::F32 | Dtype::C64 => load_wide::<f32>(view, first, buffer),
        Dtype::F64 | Dtype::C128 => memory::load(view, first, buffer),
    })
}

fn load_wide<E: Element>(view: &View, first: usize, wide: &mut [f64]) {
    let mut narrow = [E::default(); GATHER];
    let narrow = &mut narrow[..wide.len()];
    memory::load(view, first, narrow);
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        *wide = narrow.wide();
    }
}

fn in_pieces<E: Element>(x: &View, y: &View, block: Block, isa: Isa, load: impl Fn(&View, usize, &mut [E])) -> Products {
    let parts = x.dtype().parts();
    let (mut xs, mut ys) = ([E::default(); GATHER], [E::default(); GATHER]);
    merged((0..block.count).step_by(GATHER / parts).map(|position| {
        let numbers = parts * (block.count - position).min(GATHER / parts);
        load(x, block.first + position, &mut xs[..numbers]);
        load(y, block.first + position, &mut ys[..numbers]);
        dot_block(isa, &xs[..numbers], &ys[..numbers])
    }))
}
