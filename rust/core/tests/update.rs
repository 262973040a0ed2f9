//! Steps of descent against the arithmetic of one element.

mod common;

use half::{bf16, f16};
use normclip_core::kernels::Descend;
use normclip_core::{BLOCK, Dtype, Problem, Team, TensorError, Updates, View, update};
use proptest::prelude::*;
use proptest::sample::select;

use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{alone, cases, teams};

const REAL: [Dtype; 4] = [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64];

/// A parameter, its buffer if there is one, and its gradient.
struct Triple(Tensor, Option<Tensor>, Tensor);

impl Triple {
    fn views(&self) -> [View; 3] {
        match self {
            Self(x, Some(v), g) => Tensor::views_of([x, v, g]),
            Self(x, None, g) => {
                let [x, g] = Tensor::views_of([x, g]);
                [x.clone(), View::none(x.dtype()), g]
            }
        }
    }
}

fn step(triples: &[Triple], numbers: Descend, team: Team) {
    let updates = Updates::new(triples.iter().map(Triple::views).collect()).unwrap();
    // SAFETY: the tensors are ours.
    unsafe { update(&updates, move |_| numbers, team) };
}

/// The new parameter and the new buffer.
fn expected(dtype: Dtype, numbers: Descend, [x, v, g]: [f64; 3], momentum: bool) -> [f64; 2] {
    let Descend { coefficient, lr, momentum: mu, dampening, nesterov, weight_decay } = numbers;
    // Each operation in the type to compute in, f32 for halves.
    let half = matches!(dtype, Dtype::F16 | Dtype::Bf16);
    let r = |value: f64| if half { f64::from(value as f32) } else { value };
    let add = |a: f64, b: f64| if half { f64::from(a as f32 + b as f32) } else { a + b };
    let times = |a: f64, b: f64| if half { f64::from(a as f32 * b as f32) } else { a * b };
    let decay = if r(weight_decay) == 0.0 { None } else { Some(times(weight_decay, x)) };
    let d = decay.map_or(times(coefficient, g), |decay| add(times(coefficient, g), decay));
    let v = add(times(mu, v), times(1.0 - dampening, d));
    let direction = match (momentum, nesterov) {
        (false, _) => d,
        (true, false) => v,
        (true, true) => add(d, times(mu, v)),
    };
    [add(x, -times(lr, direction)), v].map(|value| match dtype {
        Dtype::F16 => f16::from_f32(value as f32).to_f64(),
        Dtype::Bf16 => bf16::from_f32(value as f32).to_f64(),
        Dtype::F32 => f64::from(value as f32),
        _ => value,
    })
}

fn same(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

fn numbers(random: &mut Random) -> Descend {
    Descend {
        coefficient: [1.0, 0.37, 0.0, 1e-30, f64::NAN][random.below(5)],
        lr: [0.1, 1.0, 1e-3][random.below(3)],
        momentum: [0.9, 0.5, 1.0][random.below(3)],
        dampening: [0.0, 0.3, 1.0][random.below(3)],
        nesterov: random.below(2) == 0,
        weight_decay: [0.0, 0.01, 1.0][random.below(3)],
    }
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn one_step(dtype in select(&REAL), alike: bool, momentum: bool, offset in 0..16usize, seed: u64) {
        let random = &mut Random(seed);
        let (shape, strides) = if alike { (vec![random.below(3000) as i64], vec![1]) } else { random.layout(3000) };
        let tensor = |offset, random: &mut Random| {
            let strides = if alike || random.below(2) == 0 { strides.clone() } else { random.strides(&shape) };
            let magnitudes = Magnitudes::any(dtype, random);
            let tensor = Tensor::strided(dtype, &shape, &strides, offset).filled(magnitudes, random);
            let mut parts = tensor.parts();
            if random.below(4) == 0 && !parts.is_empty() {
                let place = random.below(parts.len());
                parts[place] = [f64::INFINITY, f64::NAN, -0.0][random.below(3)];
            }
            tensor.holding(&parts)
        };
        let x = tensor(offset, random);
        let v = momentum.then(|| tensor(offset / 2, random));
        let triple = Triple(x, v, tensor(0, random));
        let numbers = numbers(random);
        let state = |triple: &Triple| {
            let buffer = triple.1.as_ref().map_or_else(|| vec![0.0; triple.0.len()], Tensor::parts);
            (triple.0.parts(), buffer, triple.2.parts())
        };
        let (xs, vs, gs) = state(&triple);
        let (gaps, gradient) = (triple.0.gaps(), triple.2.bytes());
        let teams = teams();
        step(std::slice::from_ref(&triple), numbers, teams[seed as usize % teams.len()]);
        let (new_xs, new_vs, _) = state(&triple);
        for i in 0..xs.len() {
            let [x, v] = expected(dtype, numbers, [xs[i], vs[i], gs[i]], momentum);
            prop_assert!(same(new_xs[i], x), "{:e} became {:e}, not {x:e}", xs[i], new_xs[i]);
            prop_assert!(!momentum || same(new_vs[i], v), "buffer {:e} became {:e}, not {v:e}", vs[i], new_vs[i]);
        }
        prop_assert!(triple.0.gaps() == gaps && triple.2.bytes() == gradient, "only elements of parameters and buffers are written");
    }
}

/// Of several blocks and of parts of one, in and out of step.
fn model(random: &mut Random) -> Vec<Triple> {
    let mut triples = Vec::new();
    for dtype in REAL {
        for (shape, strides) in
            [(vec![2 * BLOCK as i64 + 17], vec![1]), (vec![300, 301], vec![1, 310]), (vec![5], vec![1]), (vec![0], vec![1])]
        {
            let tensor = |random: &mut Random| Tensor::strided(dtype, &shape, &strides, 0).filled(Magnitudes::ORDINARY, random);
            let buffer = (random.below(2) == 0).then(|| tensor(random));
            triples.push(Triple(tensor(random), buffer, tensor(random)));
        }
    }
    triples
}

#[test]
fn every_team_gives_the_same_bits() {
    let numbers = Descend { coefficient: 1.0 / 3.0, lr: 0.1, momentum: 0.9, dampening: 0.0, nesterov: true, weight_decay: 0.01 };
    let bits = |team| {
        let triples = model(&mut Random(3));
        (0..3).for_each(|_| step(&triples, numbers, team));
        triples.iter().flat_map(|Triple(x, v, _)| [x.bytes(), v.as_ref().map_or_else(Vec::new, Tensor::bytes)]).collect::<Vec<_>>()
    };
    let first = bits(alone());
    assert!(teams().into_iter().all(|team| bits(team) == first));
}

#[test]
fn each_parameter_by_its_own_numbers() {
    let ones = || Tensor::dense(Dtype::F32, 40, 0).holding(&[1.0; 40]);
    let triples = [Triple(ones(), None, ones()), Triple(ones(), Some(ones()), ones())];
    let updates = Updates::new(triples.iter().map(Triple::views).collect()).unwrap();
    let numbers = |member: usize| Descend {
        coefficient: 0.5,
        lr: 1.0 + member as f64,
        momentum: 0.5,
        dampening: 0.5,
        nesterov: false,
        weight_decay: 0.0,
    };
    // SAFETY: the tensors are ours.
    unsafe { update(&updates, numbers, alone()) };
    assert_eq!((triples[0].0.parts(), triples[1].0.parts()), (vec![0.5; 40], vec![-0.5; 40]));
}

#[test]
fn faults_are_found_before_anything_is_written() {
    let [x, v, g] = [(); 3].map(|()| Tensor::dense(Dtype::F32, 8, 0).holding(&[1.0; 8]));
    let none = View::none(Dtype::F32);
    let fault = |triples: Vec<[View; 3]>| Updates::new(triples).map(|_| ()).unwrap_err();
    let [xs, vs, gs] = Tensor::views_of([&x, &v, &g]);
    let overlap = |index, other| TensorError { index, problem: Problem::Overlaps(other) };
    assert_eq!(fault(vec![[xs.clone(), xs.clone(), gs.clone()]]), overlap(1, 0));
    assert_eq!(fault(vec![[xs.clone(), vs.clone(), vs.clone()]]), overlap(2, 1));
    assert_eq!(fault(vec![[xs.clone(), none.clone(), gs.clone()], [xs.clone(), none.clone(), gs.clone()]]), overlap(3, 0));
    assert!(Updates::new(vec![[xs, none.clone(), gs.clone()], [vs, none, gs]]).is_ok(), "gradients are only read");
    let z = Tensor::dense(Dtype::C64, 8, 0);
    let complex = Tensor::views_of([&z, &Tensor::dense(Dtype::C64, 8, 0)]);
    let [z, dz] = complex;
    assert_eq!(fault(vec![[z, View::none(Dtype::C64), dz]]), TensorError { index: 0, problem: Problem::Complex });
}
