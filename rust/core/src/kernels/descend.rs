//! One step of gradient descent: g → v ← μ·v + (1 − τ)·d and θ ← θ − η·v, where d = c·g + λ·θ.
//!
//! Everything is computed in f64, for f16 and bf16 in f32, multiplied and then added, and what is stored is rounded once, to nearest even. NaN
//! and infinity follow IEEE arithmetic. A term whose factor λ is 0 is left out.

use crate::dtype::{Element, Float};
use crate::isa::{Isa, Op};
use crate::simd::Simd;

/// The numbers of a step.
#[derive(Clone, Copy, Debug)]
pub struct Descend {
    /// What the gradient is multiplied by, c.
    pub coefficient: f64,
    /// The learning rate η.
    pub lr: f64,
    /// The factor μ of the buffer v.
    pub momentum: f64,
    /// The share τ of d that does not enter the buffer.
    pub dampening: f64,
    /// Whether θ goes by d + μ·v instead of v.
    pub nesterov: bool,
    /// The factor λ of the parameters.
    pub weight_decay: f64,
}

impl Descend {
    /// Changes the parameters, and the buffer if there is one, else θ goes by d. All are of the same length.
    pub fn apply<E: Element>(self, isa: Isa, parameters: &mut [E], buffer: Option<&mut [E]>, gradients: &[E]) {
        isa.run(Descent { numbers: self, parameters, buffer, gradients });
    }
}

struct Descent<'a, E> {
    numbers: Descend,
    parameters: &'a mut [E],
    buffer: Option<&'a mut [E]>,
    gradients: &'a [E],
}

impl<E: Element> Op for Descent<'_, E> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, simd: S) {
        let step = Step::of(self.numbers);
        let (xs, x_tail) = self.parameters.as_chunks_mut();
        let (gs, g_tail) = self.gradients.as_chunks();
        let [mut x_last, mut v_last, mut g_last] = [[E::default(); 32]; 3];
        x_last[..x_tail.len()].copy_from_slice(x_tail);
        g_last[..g_tail.len()].copy_from_slice(g_tail);
        if let Some(buffer) = self.buffer {
            let (vs, v_tail) = buffer.as_chunks_mut();
            for ((x, v), g) in xs.iter_mut().zip(vs).zip(gs) {
                step.take(simd, x, Some(v), g);
            }
            v_last[..v_tail.len()].copy_from_slice(v_tail);
            step.take(simd, &mut x_last, Some(&mut v_last), &g_last);
            v_tail.copy_from_slice(&v_last[..v_tail.len()]);
        } else {
            for (x, g) in xs.iter_mut().zip(gs) {
                step.take(simd, x, None, g);
            }
            step.take(simd, &mut x_last, None, &g_last);
        }
        x_tail.copy_from_slice(&x_last[..x_tail.len()]);
    }
}

/// The numbers in the type to compute in.
#[derive(Clone, Copy)]
struct Step<W> {
    coefficient: W,
    lr: W,
    momentum: W,
    /// What d is multiplied by to enter the buffer. A factor of 1 leaves every bit of it.
    share: W,
    nesterov: bool,
    decays: bool,
    weight_decay: W,
}

impl<W: Float> Step<W> {
    #[inline(always)]
    fn of(numbers: Descend) -> Self {
        let Descend { coefficient, lr, momentum, dampening, nesterov, weight_decay } = numbers;
        let [coefficient, lr, momentum, share, weight_decay] = [coefficient, lr, momentum, 1.0 - dampening, weight_decay].map(W::of);
        Self { coefficient, lr, momentum, share, nesterov, decays: weight_decay != W::default(), weight_decay }
    }

    #[inline(always)]
    fn take<E: Element<Work = W>, S: Simd>(self, simd: S, parameters: &mut [E; 32], buffer: Option<&mut [E; 32]>, gradients: &[E; 32]) {
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
