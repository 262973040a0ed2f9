//! Stochastic gradient descent: d = c·g + λ·θ, v ← μ·v + (1 − τ)·d, θ ← θ − η·v.
//!
//! Input f16, bf16, f32, f64 → f32 for the 16-bit types and f64 for the others, each operation rounded there → rounded once to the element's
//! type, to nearest even. NaN and infinity follow IEEE arithmetic; a term whose factor λ is 0 is left out, so that an infinite θ makes no NaN.

use super::Update;
use crate::dtype::{Element, Float};
use crate::isa::{Isa, Op};
use crate::simd::Simd;

/// A step of gradient descent. Its state is the momentum buffer v, or none: then θ ← θ − η·d.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    /// What the gradient is multiplied by, c.
    pub coefficient: f64,
    /// The learning rate η.
    pub lr: f64,
    /// The factor μ of the buffer v.
    pub momentum: f64,
    /// The share τ of d that does not enter the buffer.
    pub dampening: f64,
    /// Whether θ goes by d + μ·v (Nesterov's momentum) instead of v.
    pub nesterov: bool,
    /// The factor λ of the parameters.
    pub weight_decay: f64,
}

impl Update for Sgd {
    fn apply<E: Element>(self, isa: Isa, parameter: &mut [E], states: &mut [&mut [E]], gradient: &[E]) {
        isa.run(Step { sgd: self, parameter, buffer: states.first_mut().map(|buffer| &mut **buffer), gradient });
    }
}

struct Step<'a, E> {
    sgd: Sgd,
    parameter: &'a mut [E],
    buffer: Option<&'a mut [E]>,
    gradient: &'a [E],
}

impl<E: Element> Op for Step<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) {
        let factors = Factors::of(self.sgd);
        let (xs, x_tail) = self.parameter.as_chunks_mut();
        let (gs, g_tail) = self.gradient.as_chunks();
        // What is left of a row of 32 is computed in a row of its own.
        let [mut x_last, mut v_last, mut g_last] = [[E::default(); 32]; 3];
        x_last[..x_tail.len()].copy_from_slice(x_tail);
        g_last[..g_tail.len()].copy_from_slice(g_tail);
        if let Some(buffer) = self.buffer {
            let (vs, v_tail) = buffer.as_chunks_mut();
            for ((x, v), g) in xs.iter_mut().zip(vs).zip(gs) {
                factors.step(simd, x, Some(v), g);
            }
            v_last[..v_tail.len()].copy_from_slice(v_tail);
            factors.step(simd, &mut x_last, Some(&mut v_last), &g_last);
            v_tail.copy_from_slice(&v_last[..v_tail.len()]);
        } else {
            for (x, g) in xs.iter_mut().zip(gs) {
                factors.step(simd, x, None, g);
            }
            factors.step(simd, &mut x_last, None, &g_last);
        }
        x_tail.copy_from_slice(&x_last[..x_tail.len()]);
    }
}

/// The numbers of a step, in the type in which it is computed.
#[derive(Clone, Copy)]
struct Factors<W> {
    coefficient: W,
    lr: W,
    momentum: W,
    /// 1 − τ, what d is multiplied by to enter the buffer.
    share: W,
    nesterov: bool,
    decays: bool,
    weight_decay: W,
}

impl<W: Float> Factors<W> {
    #[inline(always)]
    fn of(sgd: Sgd) -> Self {
        let Sgd { coefficient, lr, momentum, dampening, nesterov, weight_decay } = sgd;
        let [coefficient, lr, momentum, share, weight_decay] = [coefficient, lr, momentum, 1.0 - dampening, weight_decay].map(W::of);
        Self { coefficient, lr, momentum, share, nesterov, decays: weight_decay != W::default(), weight_decay }
    }

    #[inline(always)]
    fn step<E: Element<Work = W>, S: Simd>(self, simd: S, parameters: &mut [E; 32], buffer: Option<&mut [E; 32]>, gradients: &[E; 32]) {
        let (mut xs, gs) = (E::load(simd, *parameters), E::load(simd, *gradients));
        if let Some(buffer) = buffer {
            let mut vs = E::load(simd, *buffer);
            for ((x, v), g) in xs.iter_mut().zip(&mut vs).zip(&gs) {
                let d = self.direction(*x, *g);
                *v = self.momentum * *v + self.share * d;
                *x = *x - self.lr * if self.nesterov { d + self.momentum * *v } else { *v };
            }
            *buffer = E::store(simd, vs);
        } else {
            for (x, g) in xs.iter_mut().zip(&gs) {
                *x = *x - self.lr * self.direction(*x, *g);
            }
        }
        *parameters = E::store(simd, xs);
    }

    #[inline(always)]
    fn direction(self, x: W, g: W) -> W {
        let clipped = self.coefficient * g;
        if self.decays { clipped + self.weight_decay * x } else { clipped }
    }
}
