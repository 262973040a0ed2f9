//! All statistics at once against each by itself.

mod common;

use normclip_core::kernels::{Count, Statistics};
use normclip_core::{Dtype, Merge, Moments, Team, Tensors, merged, norm, reduce};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use common::oracle::{self, is_close};
use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{DTYPES, alone, cases, teams, to_read};

fn moments(tensors: &Tensors, finite_only: bool, team: Team) -> Moments {
    merged(reduce(tensors, Statistics { finite_only }, team))
}

/// Equal, or both NaN.
fn same(a: f64, b: f64) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn each_figure_is_that_of_its_own_kernel(
        dtype in select(&DTYPES),
        dense: bool,
        specials in prop::collection::vec((any::<Index>(), select(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0])), 0..4),
        seed: u64,
    ) {
        let random = &mut Random(seed);
        let (shape, strides) = if dense { (vec![random.below(3000) as i64], vec![1]) } else { random.layout(3000) };
        let magnitudes = Magnitudes::any(dtype, random);
        let tensor = Tensor::strided(dtype, &shape, &strides, 0).filled(magnitudes, random);
        let mut parts = tensor.parts();
        if !parts.is_empty() {
            specials.into_iter().for_each(|(index, special)| *index.get_mut(&mut parts) = special);
        }
        let tensor = tensor.holding(&parts);
        let list = to_read([&tensor]);
        let teams = teams();
        let team = teams[seed as usize % teams.len()];

        let found = moments(&list, false, team);
        let counts = merged(reduce(&list, Count, alone()));
        prop_assert_eq!((found.count, found.zeros, found.nans, found.infs), (list.len() as u64, counts.zeros, counts.nans, counts.infs));
        prop_assert!(same(found.l1(), norm(&list, 1.0, alone())));
        prop_assert!(same(found.linf(), norm(&list, f64::INFINITY, alone())));
        // The norm of complex numbers is that of their parts, and the statistics are those of their absolute values.
        let tolerance = if dtype.is_complex() { 1e-12 } else { 0.0 };
        prop_assert!(is_close(found.l2(), norm(&list, 2.0, alone()), tolerance));
        prop_assert!(Moments::from_array(found.to_array()) == found || found.l1().is_nan());

        // The statistics are those of the same tensor with its non-finite elements replaced by 0.
        for element in parts.chunks_mut(dtype.parts()) {
            if element.iter().any(|x| !x.is_finite()) {
                element.fill(0.0);
            }
        }
        let finite = moments(&list, true, team);
        prop_assert_eq!((finite.nans, finite.infs), (found.nans, found.infs));
        prop_assert!(is_close(finite.l1(), oracle::norm(dtype, &parts, 1.0), 1e-12));
        prop_assert!(is_close(finite.l2(), oracle::norm(dtype, &parts, 2.0), 1e-12));
        prop_assert_eq!(finite.linf(), moments(&to_read([&tensor.holding(&parts)]), false, alone()).linf());
    }
}

#[test]
fn derived_figures() {
    let of = |parts: &[f64]| moments(&to_read([&Tensor::dense(Dtype::F64, parts.len(), 0).holding(parts)]), false, alone());
    let found = of(&[3.0, -4.0, 0.0, 0.0]);
    assert_eq!((found.count, found.zeros, found.l1(), found.l2(), found.linf()), (4, 2, 7.0, 5.0, 4.0));
    assert_eq!((found.roots().rms(), found.mean_abs()), (2.5, 1.75));
    assert!(is_close(found.roots().sign_cosine(), 7.0 / (2f64.sqrt() * 5.0), 1e-15));
    assert!(is_close(found.roots().density(), 49.0 / (4.0 * 25.0), 1e-15));
    // Elements of equal absolute values have the greatest density, 1, at both ends of the range, too.
    for x in [1.0, 1e-320, 1e-200, 1e300] {
        assert!(is_close(of(&[x, -x, x]).roots().density(), 1.0, 1e-15) && is_close(of(&[x, -x, x]).roots().sign_cosine(), 1.0, 1e-15));
    }
    for undefined in [of(&[]), of(&[0.0, -0.0]), of(&[1.0, f64::INFINITY]), of(&[f64::NAN])] {
        assert!(undefined.roots().sign_cosine().is_nan() && undefined.roots().density().is_nan());
    }
    assert!(of(&[]).roots().rms().is_nan() && of(&[]).mean_abs().is_nan());
    assert_eq!(of(&[]), Moments::EMPTY);
}

#[test]
fn every_team_gives_the_same_bits() {
    let random = &mut Random(9);
    let mut tensors: Vec<_> = [(Dtype::F32, 140_001), (Dtype::F16, 65_537), (Dtype::F64, 66_000), (Dtype::Bf16, 31), (Dtype::C64, 5000)]
        .into_iter()
        .map(|(dtype, len)| Tensor::dense(dtype, len, 0).filled(Magnitudes::ORDINARY, random))
        .collect();
    tensors.push(Tensor::strided(Dtype::F64, &[100, 90], &[1, 101], 0).filled(Magnitudes::ORDINARY, random));
    let list = to_read(&tensors);
    let bits = |team, finite_only| moments(&list, finite_only, team).to_array().map(f64::to_bits);
    let expected = bits(alone(), false);
    for team in teams() {
        assert_eq!(bits(team, false), expected, "{team:?}");
        assert_eq!(bits(team, true), expected, "nothing to leave out, {team:?}");
    }
}
