//! Inner products and cosines against exact sums, for pairs of any layout and any two types.

mod common;

use normclip_core::{Dtype, Pairs, dot};
use proptest::prelude::*;
use proptest::sample::select;

use common::oracle::{self, Exact, is_close};
use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{alone, cases, teams};

const REAL: [Dtype; 4] = [Dtype::F16, Dtype::Bf16, Dtype::F32, Dtype::F64];
const COMPLEX: [Dtype; 2] = [Dtype::C64, Dtype::C128];

fn dtypes() -> impl Strategy<Value = (Dtype, Dtype)> {
    prop_oneof![2 => (select(&REAL), select(&REAL)), 1 => (select(&COMPLEX), select(&COMPLEX))]
}

/// Checks Σxy, both norms and the cosine of the vectors that the pairs' first and second tensors make, against exact sums.
fn check(pairs: &[(Tensor, Tensor)], seed: u64) -> Result<(), TestCaseError> {
    let xs: Vec<f64> = pairs.iter().flat_map(|(x, _)| x.parts()).collect();
    let ys: Vec<f64> = pairs.iter().flat_map(|(_, y)| y.parts()).collect();
    let list = Pairs::new(pairs.iter().map(|(x, y)| x.view_with(y)).collect());
    let teams = teams();
    let found = dot(&list, teams[seed as usize % teams.len()]);
    let (exact, total) = oracle::dot(&xs, &ys);
    let (x_norm, y_norm) = (norm(&xs), norm(&ys));
    let error = (found.xy.value() - exact).abs();
    prop_assert!(error <= 1e-12 * total + 1e-300 || total.is_infinite(), "{} instead of {exact:e}", found.xy.value());
    prop_assert!(is_close(found.xx.norm(), x_norm, 1e-12) && is_close(found.yy.norm(), y_norm, 1e-12));
    // A subnormal norm has few significant bits, so the cosine, which is divided by it, has few correct ones.
    if x_norm.is_normal() && y_norm.is_normal() {
        let (cosine, _) = oracle::dot(&normalized(&xs), &normalized(&ys));
        let cosine = cosine / (norm(&normalized(&xs)) * norm(&normalized(&ys)));
        prop_assert!((found.cosine() - cosine).abs() <= 1e-12, "cosine {}, not {cosine}", found.cosine());
    } else if x_norm == 0.0 || y_norm == 0.0 {
        prop_assert!(found.cosine().is_nan());
    }
    Ok(())
}

fn norm(xs: &[f64]) -> f64 {
    let mut squares = Exact::default();
    xs.iter().for_each(|x| squares.add_square(*x));
    squares.root()
}

/// The numbers multiplied by the power of two that makes the largest of them about 1.
fn normalized(xs: &[f64]) -> Vec<f64> {
    let largest = xs.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    xs.iter().map(|x| oracle::times_power_of_two(*x, -largest.log2() as i32)).collect()
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn any_pair((x, y) in dtypes(), shared_layout: bool, offset in 0..16usize, seed: u64) {
        let random = &mut Random(seed);
        let (shape, strides) = random.layout(3000);
        let y_strides = if shared_layout { strides.clone() } else { random.strides(&shape) };
        let (x_magnitudes, y_magnitudes) = (Magnitudes::any(x, random), Magnitudes::any(y, random));
        let x = Tensor::strided(x, &shape, &strides, offset).filled(x_magnitudes, random);
        let y = Tensor::strided(y, &shape, &y_strides, offset / 2).filled(y_magnitudes, random);
        check(&[(x, y)], seed)?;
    }

    #[test]
    fn lists_of_pairs((x, y) in dtypes(), lens in prop::collection::vec(0..200usize, 1..6), seed: u64) {
        let random = &mut Random(seed);
        let tensor = |dtype, len, random: &mut Random| {
            let magnitudes = Magnitudes::any(dtype, random);
            Tensor::dense(dtype, len, 0).filled(magnitudes, random)
        };
        let pairs: Vec<_> = lens.into_iter().map(|len| (tensor(x, len, random), tensor(y, len, random))).collect();
        check(&pairs, seed)?;
    }
}

#[test]
fn every_team_gives_the_same_bits() {
    let random = &mut Random(6);
    let tensor = |dtype, shape: &[i64], strides: &[i64], random: &mut Random| {
        Tensor::strided(dtype, shape, strides, 0).filled(Magnitudes::ORDINARY, random)
    };
    let mut pairs = Vec::new();
    for (x, y) in [(Dtype::F16, Dtype::F16), (Dtype::F64, Dtype::F64), (Dtype::F32, Dtype::Bf16), (Dtype::C64, Dtype::C64)] {
        for len in [70_001, 40, 3] {
            pairs.push((tensor(x, &[len], &[1], random), tensor(y, &[len], &[1], random)));
        }
        pairs.push((tensor(x, &[60, 50], &[1, 61], random), tensor(y, &[60, 50], &[50, 1], random)));
    }
    check(&pairs[..2], 0).unwrap();
    let list = Pairs::new(pairs.iter().map(|(x, y)| x.view_with(y)).collect());
    let bits = |team| {
        let found = dot(&list, team);
        [found.xy.value(), found.xx.norm(), found.yy.norm(), found.cosine()].map(f64::to_bits)
    };
    assert!(teams().into_iter().all(|team| bits(team) == bits(alone())));
}

#[test]
fn a_pair_counts_once_and_its_members_as_often_as_they_meet_others() {
    let [x, y, z] = [[1.0, 2.0], [3.0, -1.0], [5.0, 7.0]].map(|parts| Tensor::dense(Dtype::F32, 2, 0).holding(&parts));
    let pairs = vec![x.view_with(&y), x.view_with(&z), x.view_with(&y), y.view_with(&x)];
    let found = dot(&Pairs::new(pairs), alone());
    assert_eq!(found.xy.value(), 1.0 + 19.0 + 1.0);
    assert_eq!((found.xx.norm(), found.yy.norm()), ((5.0 + 5.0 + 10.0f64).sqrt(), (10.0 + 74.0 + 5.0f64).sqrt()));
}

#[test]
fn numbers_that_are_not_finite_pass_through() {
    let dot_of = |x: f64, y: f64| {
        let [x, y] = [[x, 1.0], [y, 1.0]].map(|parts| Tensor::dense(Dtype::F64, 2, 0).holding(&parts));
        dot(&Pairs::new(vec![x.view_with(&y)]), alone())
    };
    assert!(dot_of(f64::NAN, 1.0).xy.value().is_nan() && dot_of(f64::NAN, 1.0).cosine().is_nan());
    assert_eq!(dot_of(f64::INFINITY, -1.0).xy.value(), f64::NEG_INFINITY);
    assert!(dot_of(f64::INFINITY, 0.0).xy.value().is_nan());
    assert!(dot_of(f64::INFINITY, 1.0).cosine().is_nan());
}

#[test]
fn cosines_at_the_ends_of_the_range() {
    for x in [1e-307, 1e-300, 1e-150, 1.0, 1e150, 1e307] {
        for y in [1e-307, 1e-300, 1e-150, 1.0, 1e150, 1e307] {
            let pair = [[x, x], [y, -0.5 * y]].map(|parts| Tensor::dense(Dtype::F64, 2, 0).holding(&parts));
            let found = dot(&Pairs::new(vec![pair[0].view_with(&pair[1])]), alone()).cosine();
            assert!((found - 0.1f64.sqrt()).abs() < 1e-15, "{x:e}, {y:e}: {found}");
        }
    }
}

#[test]
fn small_elements_that_meet_large_ones_count() {
    let [tiny, small, large] = [1e-300, 1e-136, 1e136];
    let of = |x: &[f64], y: &[f64]| {
        let pair = [x, y].map(|parts| Tensor::dense(Dtype::F64, parts.len(), 0).holding(parts));
        dot(&Pairs::new(vec![pair[0].view_with(&pair[1])]), alone()).xy.value()
    };
    assert_eq!(of(&[large, 0.0, 1.0], &[0.0, large, 1.0]), 1.0);
    assert_eq!(of(&[1e300, small, 0.0], &[tiny, large, 1e300]), 2.0);
    assert_eq!(of(&[5.7e-175, -1.3e19], &[3.6e283, -1.7e18]), 5.7e-175 * 3.6e283);
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn vectors_however_far_apart(len in 1..40usize, matched: bool, seed: u64) {
        let random = &mut Random(seed);
        let anywhere = Magnitudes { low: -1022, high: 1020, ends: false, zeros: 0 };
        let xs: Vec<f64> = (0..len).map(|_| anywhere.draw(random)).collect();
        // Or such exponents that some of the products are about 1.
        let partner = |x: &f64| if matched && random.below(8) > 0 { (1.0 / x).clamp(-1e300, 1e300) } else { anywhere.draw(random) };
        let ys: Vec<f64> = xs.iter().map(partner).collect();
        let tensor = |parts: &[f64]| Tensor::dense(Dtype::F64, parts.len(), 0).holding(parts);
        check(&[(tensor(&xs), tensor(&ys))], seed)?;
    }
}

#[test]
fn zeros_meet_huge_numbers() {
    let pair = [[1e300, -1e200], [0.0, -0.0]].map(|parts| Tensor::dense(Dtype::F64, 2, 0).holding(&parts));
    let found = dot(&Pairs::new(vec![pair[0].view_with(&pair[1])]), alone());
    assert_eq!((found.xy.value(), found.xx.norm(), found.yy.norm()), (0.0, 1e300, 0.0));
}
