//! Norms against the oracle: every element type, order, layout and magnitude, NaN and infinity.

mod common;

use normclip_core::{Dtype, WritableTensors, norm};
use proptest::prelude::*;
use proptest::sample::select;

use common::oracle::{self, is_close};
use common::random::{Magnitudes, Random};
use common::tensor::Tensor;
use common::{DTYPES, ORDERS, alone, cases, teams, to_read};

const TOLERANCE: f64 = 1e-12;

/// Checks the norms of the vector that all tensors make together.
fn check(tensors: &[Tensor], orders: &[f64], seed: u64) -> Result<(), TestCaseError> {
    let dtype = tensors[0].dtype();
    let parts: Vec<f64> = tensors.iter().flat_map(Tensor::parts).collect();
    let list = to_read(tensors);
    // Any team will do: tests/bits.rs shows that all give the same bits.
    let teams = teams();
    let team = teams[seed as usize % teams.len()];
    for &order in orders {
        let (found, exact) = (norm(&list, order, team), oracle::norm(dtype, &parts, order));
        prop_assert!(
            is_close(found, exact, TOLERANCE),
            "{} elements of {}: order {order} gives {found:e}, not {exact:e}",
            list.len(),
            dtype.name()
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn dense(dtype in select(&DTYPES), len in 0..=5000usize, offset in 0..16usize, seed: u64) {
        let random = &mut Random(seed);
        let magnitudes = Magnitudes::any(dtype, random);
        check(&[Tensor::dense(dtype, len, offset).filled(magnitudes, random)], &ORDERS, seed)?;
    }

    #[test]
    fn strided(dtype in select(&DTYPES), offset in 0..16usize, expanded: bool, seed: u64) {
        let random = &mut Random(seed);
        let magnitudes = Magnitudes::any(dtype, random);
        let (shape, mut strides) = random.layout(3000);
        if expanded {
            let dim = random.below(strides.len());
            strides[dim] = 0;
        }
        check(&[Tensor::strided(dtype, &shape, &strides, offset).filled(magnitudes, random)], &ORDERS, seed)?;
    }

    #[test]
    fn lists(dtype in select(&DTYPES), lens in prop::collection::vec(0..300usize, 1..8), seed: u64) {
        let random = &mut Random(seed);
        let tensor = |len| {
            // Each tensor has a magnitude of its own, so that totals of different scales are merged.
            let magnitudes = Magnitudes::any(dtype, random);
            Tensor::dense(dtype, len, 0).filled(magnitudes, random)
        };
        let tensors: Vec<_> = lens.into_iter().map(tensor).collect();
        check(&tensors, &ORDERS, seed)?;
    }

    #[test]
    fn special_values(
        dtype in select(&DTYPES),
        len in 1..200usize,
        specials in prop::collection::vec((any::<prop::sample::Index>(), select(&[f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0])), 0..5),
        nan: bool,
        seed: u64,
    ) {
        let random = &mut Random(seed);
        let magnitudes = Magnitudes::any(dtype, random);
        let tensor = Tensor::dense(dtype, len, 0).filled(magnitudes, random);
        let mut parts = tensor.parts();
        for (index, special) in specials {
            // A NaN makes every norm NaN, so half of the cases have none.
            let index = index.index(parts.len());
            parts[index] = if special.is_nan() && !nan { f64::INFINITY } else { special };
        }
        check(&[tensor.holding(&parts)], &ORDERS, seed)?;
    }
}

/// Lengths around the length of one block, and of several blocks.
fn check_blocks(dtype: Dtype) {
    for (seed, len) in [(1, 65535), (2, 65536), (3, 65537), (4, 200_000)] {
        let random = &mut Random(seed);
        let (low, high) = Magnitudes::limits(dtype);
        let magnitudes = if len == 65537 { Magnitudes { low, high, ends: true, zeros: 9 } } else { Magnitudes::ORDINARY };
        // One order for each kernel of general powers, which are slow.
        let orders = [2.0, 1.0, f64::INFINITY, f64::NEG_INFINITY, 0.0, 3.0, [0.5, 2.5, -1.0, 100.0][seed as usize % 4]];
        let offset = [0, 1][seed as usize % 2];
        check(&[Tensor::dense(dtype, len, offset).filled(magnitudes, random)], &orders, seed).unwrap();
    }
    let transposed = Tensor::strided(dtype, &[300, 250], &[1, 301], 0).filled(Magnitudes::ORDINARY, &mut Random(5));
    check(&[transposed], &[2.0, 1.0, f64::INFINITY, 3.0], 5).unwrap();
}

#[test]
fn many_blocks_of_f16() {
    check_blocks(Dtype::F16);
}

#[test]
fn many_blocks_of_bf16() {
    check_blocks(Dtype::Bf16);
}

#[test]
fn many_blocks_of_f32() {
    check_blocks(Dtype::F32);
}

#[test]
fn many_blocks_of_f64() {
    check_blocks(Dtype::F64);
}

#[test]
fn many_blocks_of_c64() {
    check_blocks(Dtype::C64);
}

#[test]
fn many_blocks_of_c128() {
    check_blocks(Dtype::C128);
}

#[test]
fn huge_and_tiny_numbers_meet() {
    let norm_of = |parts: &[f64], order| norm(&to_read([&Tensor::dense(Dtype::F64, parts.len(), 0).holding(parts)]), order, alone());
    assert_eq!(norm_of(&[3e200, 4e-200], 2.0), 3e200);
    assert!(is_close(norm_of(&[3e200, 4e200, 1e-200], 2.0), 5e200, 1e-15));
    assert!(is_close(norm_of(&[3e-200, 4e-200, 0.0], 2.0), 5e-200, 1e-15));
    assert!(is_close(norm_of(&[3e-200, 4e-200, 0.0], 3.0), 91f64.cbrt() * 1e-200, 1e-14));
    // The norm is 5 · 2⁻¹⁰⁷⁴, and all elements are subnormal.
    assert_eq!(norm_of(&[f64::from_bits(3), f64::from_bits(4)], 2.0), f64::from_bits(5));
    let whole = norm(&to_read([&Tensor::dense(Dtype::F32, 4, 0).holding(&[1e38; 4])]), 2.0, alone());
    assert!(is_close(whole, 2.0 * f64::from(1e38f32), 1e-15));
}

#[test]
fn like_numbers_of_every_magnitude_merge() {
    // Tensors have blocks of their own: the sum of each block is in range, and their total may not be.
    for exponent in -1074..=1000 {
        let x = oracle::times_power_of_two(1.5, exponent);
        let tensors = [0.5, 1.0, 1.0].map(|factor| Tensor::dense(Dtype::F64, 1, 0).holding(&[factor * x]));
        check(&tensors, &[2.0, 1.0, 3.0, 4.0, 2.5, 1000.0, -1.0, -2.5, -1000.0], exponent.unsigned_abs().into()).unwrap();
    }
}

#[test]
fn subnormal_and_barely_normal_numbers_meet() {
    // Tensors have blocks of their own: one total, an unscaled sum of 10³⁰⁸, is merged with one that is scaled by a subnormal number.
    let tensors = [1e-310, 1.5e-308].map(|x| Tensor::dense(Dtype::F64, 1, 0).holding(&[x]));
    let exact = 1e-310 / (1.0 + 1e-310 / 1.5e-308);
    assert!(is_close(norm(&to_read(&tensors), -1.0, alone()), exact, TOLERANCE));
    assert!(is_close(norm(&to_read(tensors.iter().rev()), -1.0, alone()), exact, TOLERANCE));
}

#[test]
fn nothing_and_only_infinities() {
    for order in ORDERS {
        assert_eq!(norm(&to_read([]), order, alone()), 0.0);
        assert_eq!(norm(&to_read([&Tensor::dense(Dtype::F32, 0, 0)]), order, alone()), 0.0);
    }
    for dtype in DTYPES {
        let tensor = Tensor::strided(dtype, &[3], &[1], 0);
        let tensor = {
            let parts = vec![f64::NEG_INFINITY; tensor.parts().len()];
            tensor.holding(&parts)
        };
        for order in ORDERS {
            let expected = if order == 0.0 { 3.0 } else { f64::INFINITY };
            // For negative orders, each infinity adds 0 to the sum, and a sum of 0 has an infinite inverse power.
            assert_eq!(norm(&to_read([&tensor]), order, alone()), expected, "order {order} of {}", dtype.name());
            assert_eq!(norm(&to_read([&tensor, &tensor, &Tensor::dense(dtype, 0, 0)]), order, alone()), expected, "order {order}");
        }
        assert!(norm(&to_read([&tensor]), f64::NAN, alone()).is_nan(), "order NaN of {}", dtype.name());
    }
}

#[test]
fn repeated_tensors_count_once() {
    let matrix = Tensor::strided(Dtype::F32, &[30, 40], &[1, 30], 0).filled(Magnitudes::ORDINARY, &mut Random(1));
    let other = Tensor::dense(Dtype::F32, 77, 0).filled(Magnitudes::ORDINARY, &mut Random(2));
    let once = to_read([&matrix, &other]);
    let views = vec![matrix.view(), other.view(), matrix.view_reversed(), other.view()];
    let repeated = WritableTensors::new(views).unwrap();
    assert_eq!((repeated.len(), repeated.bytes()), (once.len(), once.bytes()));
    for order in ORDERS {
        assert_eq!(norm(&repeated, order, alone()), norm(&once, order, alone()));
    }
}
