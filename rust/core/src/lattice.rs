//! Whether Σ strideᵢ·xᵢ, with a bound for each xᵢ, can lie in an interval. "Do these strided tensors share a byte" is this question.

/// A stride, at least 1, and the largest value of its x.
pub(crate) type Term = (i128, i128);

/// The search was given up after [`CASES`] cases. It takes at least three strides none of which exceeds the reach of the smaller ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unknown;

/// The most cases that a search tries, each of which takes some ten nanoseconds.
const CASES: u32 = 1 << 20;

/// Whether there are numbers 0 ≤ xᵢ ≤ mostᵢ with low ≤ Σ strideᵢ·xᵢ ≤ high. Exact.
///
/// All values of the widest stride's x are tried from which the other terms can still reach the interval: one or two where the strides are
/// those of nested loops. The last two strides are solved directly.
pub(crate) fn reaches(terms: impl IntoIterator<Item = Term>, low: i128, high: i128) -> Result<bool, Unknown> {
    let mut sorted: Vec<Term> = terms.into_iter().filter(|(_, most)| *most > 0).collect();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    // Two terms of the same stride are one with the sum of their bounds.
    sorted.dedup_by(|(stride, most), (kept, sum)| {
        let same = stride == kept;
        *sum += if same { *most } else { 0 };
        same
    });
    let mut cases = CASES;
    search(&sorted, low, high, &mut cases)
}

fn search(terms: &[Term], low: i128, high: i128, cases: &mut u32) -> Result<bool, Unknown> {
    let reach = |terms: &[Term]| terms.iter().map(|(stride, most)| stride * most).sum::<i128>();
    if high < 0 || low > reach(terms) {
        return Ok(false);
    }
    *cases = cases.checked_sub(1).ok_or(Unknown)?;
    match *terms {
        [] => Ok(low <= 0),
        [(stride, most)] => Ok(ceil(low, stride).max(0) <= high.div_euclid(stride).min(most)),
        [wide, narrow] => Ok(two(wide, narrow, low, high)),
        [(stride, most), ref rest @ ..] => {
            let divisor = rest.iter().fold(stride, |divisor, (stride, _)| gcd(divisor, *stride));
            if high.div_euclid(divisor) * divisor < low {
                return Ok(false);
            }
            let tries = ceil(low - reach(rest), stride).max(0)..=high.div_euclid(stride).min(most);
            for x in tries {
                if search(rest, low - stride * x, high - stride * x, cases)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
    }
}

/// [`reaches`] for two strides, in as many steps as Euclid's algorithm takes.
fn two((a, a_most): Term, (b, b_most): Term, low: i128, high: i128) -> bool {
    let width = high - low;
    // The x for which some real y from 0 to b_most is a solution. It remains to find one with an integer y.
    let (first, last) = (ceil(low - b * b_most, a).max(0), high.div_euclid(a).min(a_most));
    if first > last {
        return false;
    }
    if width >= b - 1 {
        return true;
    }
    // high − a·x has to be a multiple of b plus at most `width`. Its remainder at the first x:
    let rest = (high - a * first).rem_euclid(b);
    rest <= width || first_within(a % b, b, rest - width, rest).is_some_and(|steps| first + steps <= last)
}

/// The smallest x ≥ 0 for which a·x modulo m lies in low ..= high, where a < m and 0 < low ≤ high < m.
fn first_within(a: i128, m: i128, low: i128, high: i128) -> Option<i128> {
    if a == 0 {
        return None;
    }
    if 2 * a > m {
        return first_within(m - a, m, m - high, m - low);
    }
    let x = ceil(low, a);
    if x * a <= high {
        return Some(x);
    }
    // No multiple of a lies in the interval below m. How many times to add m to the interval until one does, is the same question modulo a.
    let rounds = first_within((-m).rem_euclid(a), a, low % a, high % a)?;
    Some(ceil(low + m * rounds, a))
}

fn ceil(a: i128, b: i128) -> i128 {
    -(-a).div_euclid(b)
}

fn gcd(a: i128, b: i128) -> i128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reaches_naively(terms: &[Term], low: i128, high: i128) -> bool {
        match terms {
            [] => low <= 0 && 0 <= high,
            [(stride, most), rest @ ..] => (0..=*most).any(|x| reaches_naively(rest, low - stride * x, high - stride * x)),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_search_finds_what_trying_all_finds(
            terms in prop::collection::vec((1..=40i128, 0..=9i128), 0..=4),
            low in -50..=600i128,
            width in 0..=12i128,
        ) {
            prop_assert_eq!(reaches(terms.iter().copied(), low, low + width), Ok(reaches_naively(&terms, low, low + width)));
        }

        #[test]
        fn the_first_multiple_is_found(m in 2..=300i128, a in 0..300i128, low in 1..300i128, width in 0..20i128) {
            let (a, low) = (a % m, 1 + low % (m - 1));
            let high = (low + width).min(m - 1);
            prop_assert_eq!(first_within(a, m, low, high), (0..m).find(|x| (low..=high).contains(&(a * x % m))));
        }
    }

    #[test]
    fn large_numbers_take_few_cases() {
        let (a, b) = ((1 << 46) - 21, (1 << 45) - 55);
        assert_eq!(reaches([(a, 1 << 20), (b, 1 << 20)], 12_345 * a + 54_321 * b, 12_345 * a + 54_321 * b), Ok(true));
        assert_eq!(reaches([(6, 1 << 40), (10, 1 << 40)], (1 << 40) + 1, (1 << 40) + 1), Ok(false), "odd");
        let nested = [(1 << 40, 1000), (1 << 30, 1000), (1 << 20, 1000), (1 << 10, 1000), (8, 100)];
        assert_eq!(reaches(nested, (5 << 40) + (1000 << 20) + 816, (5 << 40) + (1000 << 20) + 900), Ok(false));
        assert_eq!(reaches(nested, (5 << 40) + (1000 << 20) + 795, (5 << 40) + (1000 << 20) + 900), Ok(true));
    }

    #[test]
    fn a_search_without_pattern_ends() {
        let terms = [(1_000_003, 1 << 30), (1_000_033, 1 << 30), (1_000_037 * 2, 1 << 30), (999_983, 1 << 30)];
        let _ = reaches(terms, 1 << 49, 1 << 49);
        let odd = terms.map(|(stride, most)| (2 * stride, most));
        assert_eq!(reaches(odd, (1 << 49) + 1, (1 << 49) + 1), Ok(false), "divisors tell");
    }
}
