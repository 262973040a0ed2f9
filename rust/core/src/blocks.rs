//! The cut of a list of tensors into blocks of a fixed size, whatever the number of threads.
//!
//! A block never spans tensors, so a tensor's total does not depend on its neighbours. Threads claim *pieces* of several blocks, as a block
//! of a small tensor is too little work to claim. Neither is stored: the tensors are laid out one after the other on a number line, which is
//! divided into pieces, and the blocks of a piece are those that begin in it.

use std::iter;
use std::ops::Range;

use crate::error::{OutOfMemory, room};

/// Elements of a block: few enough for the error bound and for a core's cache, and so many that the time to find a block does not count.
pub const BLOCK: usize = 1 << 16;

/// Consecutive elements of a tensor: `count` from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) tensor: usize,
    pub(crate) first: usize,
    pub(crate) count: usize,
}

/// The tensors on the number line.
#[derive(Debug)]
pub(crate) struct Cut {
    /// Where each tensor begins, and where the last ends. A tensor with elements takes their number plus [`BESIDES`].
    starts: Vec<usize>,
    elements: usize,
}

/// The time that a tensor takes however few its elements are, as a number of elements. It bounds the number of tiny tensors in a piece.
const BESIDES: usize = 1 << 10;

/// Pieces are long at first, so that a thread reads long stretches, for which the hardware fetches ahead; the last [`REST`] of the line is
/// divided into short ones, so that all threads end at about the same time.
const LONG: usize = 8 * BLOCK;
const SHORT: usize = BLOCK;
const REST: usize = 256 * SHORT;

/// About as many blocks as a short piece has when all tensors are small.
pub(crate) const USUAL: usize = SHORT / BESIDES;

impl Cut {
    /// Lays out tensors of these numbers of elements.
    pub(crate) fn new(lens: impl Iterator<Item = usize>) -> Self {
        let mut starts = room(lens.size_hint().0 + 1);
        let (mut end, mut elements) = (0_usize, 0);
        starts.push(end);
        for len in lens {
            if len > 0 {
                // Overflow takes more than 2¹⁶ tensors of the largest size that `View` accepts: all expanded, as nothing else is as large.
                end = end.checked_add(len + BESIDES).unwrap_or_else(|| OutOfMemory::unwind());
                elements += len;
            }
            starts.push(end);
        }
        Self { starts, elements }
    }

    /// The elements of all tensors.
    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    /// The number of pieces.
    pub(crate) fn pieces(&self) -> usize {
        let (long, rest) = self.long_and_rest();
        long + rest.len().div_ceil(SHORT)
    }

    /// The blocks of a piece, in the order of the tensors.
    pub(crate) fn piece(&self, index: usize) -> impl Iterator<Item = Block> + '_ {
        let (long, rest) = self.long_and_rest();
        let piece = match index.checked_sub(long) {
            None => index * LONG..(index + 1) * LONG,
            Some(short) => rest.start + short * SHORT..(rest.start + (short + 1) * SHORT).min(rest.end),
        };
        let mut tensor = self.starts.partition_point(|start| *start <= piece.start).saturating_sub(1);
        let mut first = (piece.start - self.starts[tensor]).next_multiple_of(BLOCK);
        iter::from_fn(move || {
            loop {
                let (start, end) = (self.starts[tensor], *self.starts.get(tensor + 1)?);
                let len = (end - start).saturating_sub(BESIDES);
                if first < len {
                    let block = Block { tensor, first, count: BLOCK.min(len - first) };
                    first += BLOCK;
                    return (start + block.first < piece.end).then_some(block);
                }
                (tensor, first) = (tensor + 1, 0);
            }
        })
    }

    /// The number of long pieces, and the rest of the line.
    fn long_and_rest(&self) -> (usize, Range<usize>) {
        let end = self.starts.last().copied().unwrap_or(0);
        let long = end.saturating_sub(REST) / LONG;
        (long, long * LONG..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hold_each_block_once_and_in_order() {
        let lists: [&[usize]; 7] = [
            &[],
            &[0, 0],
            &[1],
            &[2 * BLOCK + 1, 0, BLOCK, BLOCK - 1, 7, 0],
            &[5; 3000],
            &[700 * BLOCK + 3, 1, 0, 300 * BLOCK, 64],
            &[BLOCK - BESIDES, BLOCK - BESIDES + 1, BLOCK - BESIDES - 1, 1],
        ];
        for lens in lists {
            let cut = Cut::new(lens.iter().copied());
            let found: Vec<Block> = (0..cut.pieces()).flat_map(|piece| cut.piece(piece)).collect();
            let blocks = |(tensor, &len): (usize, &usize)| {
                (0..len).step_by(BLOCK).map(move |first| Block { tensor, first, count: BLOCK.min(len - first) }).collect::<Vec<_>>()
            };
            assert_eq!(found, lens.iter().enumerate().flat_map(blocks).collect::<Vec<_>>());
            assert_eq!(cut.elements, lens.iter().sum());
        }
    }

    #[test]
    fn pieces_are_long_first_and_short_at_the_end() {
        let cut = Cut::new([1000 * BLOCK].into_iter());
        let blocks: Vec<usize> = (0..cut.pieces()).map(|piece| cut.piece(piece).count()).filter(|count| *count > 0).collect();
        assert_eq!((blocks[0], blocks[blocks.len() - 1]), (8, 1));
        assert!(blocks.is_sorted_by(|a, b| a >= b));
        assert!((256..300).contains(&blocks.iter().filter(|count| **count == 1).count()));
        let tiny = Cut::new(iter::repeat_n(1, 10_000));
        assert!(
            (0..tiny.pieces()).all(|piece| tiny.piece(piece).count() <= 1 + SHORT / BESIDES),
            "tiny tensors have a weight of their own"
        );
    }

    #[test]
    fn a_tensor_of_many_elements_costs_nothing() {
        let cut = Cut::new([1 << 46].into_iter());
        assert_eq!(cut.elements, 1 << 46);
        assert_eq!(cut.piece(1 << 20).next(), Some(Block { tensor: 0, first: LONG << 20, count: BLOCK }));
    }
}
