//! Totals and merging them: within the tolerance in any order, right where blocks have different scales, and one for each tensor.

mod common;

use normclip_core::kernels::{Abs, Count, Counts, Elements, Kernel, SumOf, SumSquares};
use normclip_core::{Dtype, Isa, Largest, Merge, Smallest, Squares, Sum, Tensors, merged, nonfinite, reduce};
use proptest::prelude::*;

use common::oracle::{Exact, is_close};
use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{alone, cases, teams, to_read};

/// Merges pairs of halves, as if each half had been summed on another machine.
fn merged_by_halves<T: Merge>(totals: &[T]) -> T {
    match totals {
        [] => T::EMPTY,
        [total] => *total,
        _ => {
            let (left, right) = totals.split_at(totals.len() / 2);
            let mut total = merged_by_halves(left);
            total.merge(&merged_by_halves(right));
            total
        }
    }
}

fn check_sums(magnitudes: Magnitudes) {
    let random = &mut Random(3);
    let mut values: Vec<f64> = (0..1_000_000).map(|_| magnitudes.draw(random).abs()).collect();
    let mut exact = Exact::default();
    values.iter().for_each(|value| exact.add(*value));
    let exact = exact.value();
    let check = |values: &[f64], order| {
        let sums: Vec<_> = values.iter().copied().map(Sum::of).collect();
        for total in [merged(sums.iter().copied()), merged_by_halves(&sums)] {
            assert!(is_close(total.value(), exact, 4e-16), "{order}: {:e}, not {exact:e}", total.value());
        }
    };
    check(&values, "as drawn");
    values.sort_by(f64::total_cmp);
    check(&values, "ascending");
    values.reverse();
    check(&values, "descending");
    random.shuffle(&mut values);
    check(&values, "shuffled");
}

#[test]
fn a_million_like_sums_merge_in_any_order() {
    check_sums(Magnitudes::ORDINARY);
}

#[test]
fn a_million_unlike_sums_merge_in_any_order() {
    check_sums(Magnitudes { low: -60, high: 20, ends: false, zeros: 10 });
}

#[test]
fn infinite_and_missing_sums_stay_so() {
    let total = |values: &[f64]| merged(values.iter().copied().map(Sum::of)).value();
    assert_eq!(total(&[]), 0.0);
    assert_eq!(total(&[f64::MAX, f64::MAX, 1.0]), f64::INFINITY);
    assert_eq!(total(&[1.0, f64::INFINITY, f64::INFINITY, 0.0, 1.0]), f64::INFINITY);
    assert!(total(&[1.0, f64::NAN, f64::INFINITY]).is_nan() && total(&[f64::INFINITY, f64::NAN, 0.0, 1.0]).is_nan());
    assert_eq!(Sum::of(f64::INFINITY).times(0.0).value(), f64::INFINITY);
    assert!(Sum::of(f64::NAN).times(0.5).value().is_nan());
    assert_eq!(Sum::of(3.0).times(0.5).value(), 1.5);
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn squares_of_any_scale_merge_in_any_order(lens in prop::collection::vec(0..50usize, 1..20), seed: u64) {
        let random = &mut Random(seed);
        let mut exact = Exact::default();
        let mut totals: Vec<Squares> = Vec::new();
        for len in lens {
            let magnitudes = Magnitudes::any(Dtype::F64, random);
            let values: Vec<f64> = (0..len).map(|_| magnitudes.draw(random)).collect();
            values.iter().for_each(|x| exact.add_square(*x));
            totals.push(SumSquares.block(&Elements::slice(Isa::BASELINE, &values)));
        }
        for _ in 0..4 {
            prop_assert!(is_close(merged(totals.iter().copied()).norm(), exact.root(), 1e-14));
            prop_assert!(is_close(merged_by_halves(&totals).norm(), exact.root(), 1e-14));
            random.shuffle(&mut totals);
        }
    }

    #[test]
    fn extremes_and_counts_merge_in_any_order(mut values in prop::collection::vec(any::<f64>().prop_map(f64::abs), 0..10)) {
        let is_nan = values.iter().any(|x| x.is_nan());
        let largest = values.iter().copied().fold(0.0, f64::max);
        let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
        for _ in 0..values.len() {
            values.rotate_left(1);
            let found = (merged(values.iter().copied().map(Largest)).0, merged(values.iter().copied().map(Smallest)).0);
            prop_assert_eq!((found.0.is_nan(), found.1.is_nan()), (is_nan, is_nan));
            prop_assert!(is_nan || found == (largest, smallest));
        }
        prop_assert_eq!(merged(values.iter().map(|_| 3u64)), 3 * values.len() as u64);
    }
}

#[test]
fn squares_just_inside_and_outside_of_the_plain_range() {
    // From the largest magnitudes to the smallest, past both limits of the range in which squares are summed unscaled.
    for exponent in -1074..=1023 {
        let x = common::oracle::times_power_of_two(1.0, exponent);
        let block = |values: &[f64]| SumSquares.block(&Elements::slice(Isa::BASELINE, values));
        assert_eq!(merged([block(&[x])]).norm(), x);
        let same = [block(&[x, x]), block(&[x, x])];
        assert_eq!(merged(same).norm(), 2.0 * x, "2^{exponent}, where the total may overflow though no block does");
        let mut exact = Exact::default();
        [x, 1.0, 1.0].into_iter().for_each(|x| exact.add_square(x));
        for total in [block(&[x, 1.0, 1.0]), merged([block(&[x]), block(&[1.0, 1.0])]), merged([block(&[1.0]), block(&[1.0, x])])] {
            assert!(is_close(total.norm(), exact.root(), 1e-15), "2^{exponent}");
        }
    }
}

#[test]
fn each_tensor_has_its_own_total() {
    let random = &mut Random(8);
    let tensors: Vec<_> = [100_000, 0, 7, 70_000, 300_000, 1]
        .into_iter()
        .map(|len| Tensor::dense(Dtype::F32, len, 0).filled(Magnitudes::ORDINARY, random))
        .collect();
    let mut views: Vec<_> = tensors.iter().map(Tensor::view).collect();
    views.push(tensors[3].view_reversed());
    let list = Tensors::new(views);
    for team in teams() {
        let totals = reduce(&list, SumOf(Abs), team);
        for (tensor, total) in tensors.iter().zip(&totals) {
            assert_eq!(total.value(), merged(reduce(&to_read([tensor]), SumOf(Abs), alone())).value());
        }
        assert_eq!(totals[6], Sum::EMPTY, "a repeated tensor counts where it came first");
        assert_eq!(totals.len(), 7);
    }
}

#[test]
fn tensors_that_are_not_finite_are_named() {
    let tensor = |parts: &[f64]| Tensor::dense(Dtype::F16, parts.len(), 0).holding(parts);
    let tensors = [
        tensor(&[1.0, 0.0]),
        tensor(&[f64::NAN, 0.0, f64::INFINITY, f64::NEG_INFINITY]),
        tensor(&[]),
        Tensor::dense(Dtype::C64, 3, 1).holding(&[0.0, 0.0, f64::INFINITY, 1.0, f64::NAN, 2.0]),
    ];
    let expected = [(1, Counts { zeros: 1, nans: 1, infs: 2 }), (3, Counts { zeros: 1, nans: 1, infs: 1 })];
    assert_eq!(nonfinite(&to_read(&tensors), alone()), expected);
    let zeros = merged(reduce(&to_read(&tensors), Count, alone())).zeros;
    assert_eq!(zeros, 3);
}
