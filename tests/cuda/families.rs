//! Every family in both types: prompts at once and in chunks, decoding, batches of 1, 4 and 16,
//! sequences that share blocks of the cache.

use crate::answers::Catalogue;
use crate::{Pair, golden};
use targon_engine::models::pass::{Batch, RowAsk};
use targon_engine::ops::dtype::Dtype;

/// A sequence as a scheduler knows it.
pub(crate) struct Sequence {
    pub(crate) ids: Vec<u32>,
    pub(crate) at: usize,
    pub(crate) blocks: Vec<u32>,
}

impl Sequence {
    pub(crate) fn new(seed: usize, vocab: usize, blocks: Vec<u32>) -> Self {
        let ids = (0..100).map(|i| (i * i * 7 + i * (3 + seed) + seed) % vocab);
        Self { ids: ids.map(|id| id as u32).collect(), at: 0, blocks }
    }

    /// One that begins with the first block of another.
    pub(crate) fn fork(&self, seed: usize, vocab: usize, own: Vec<u32>) -> Self {
        let mut other = Self::new(seed, vocab, [&self.blocks[..1], &own].concat());
        other.ids[..32].copy_from_slice(&self.ids[..32]);
        other.at = 32;
        other
    }
}

/// The next rows of some sequences in one step; every row is asked.
fn advance(
    pair: &mut Pair,
    catalogue: &Catalogue,
    sequences: &mut [Sequence],
    rows: &[(usize, usize)],
    place: &str,
) {
    let (mut batch, mut asks) = (Batch::default(), Vec::<RowAsk<'_>>::new());
    for (index, count) in rows {
        let Sequence { ids, at, blocks } = &mut sequences[*index];
        let placed = batch.push(&ids[*at..*at + count], *at, blocks.clone());
        asks.extend(placed.zip(*at..).map(|(row, at)| catalogue.ask(row, at, row + at + index)));
        *at += count;
    }
    pair.step(&batch, &asks, place);
}

fn check(family: &str) {
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let mut pair = Pair::new(&golden(family), Some(dtype), 0, 64);
        let catalogue = Catalogue::new(pair.vocab, pair.hidden, 11);
        let vocab = pair.vocab;
        let mut s = vec![
            Sequence::new(0, vocab, vec![5, 3, 9]),
            Sequence::new(1, vocab, vec![0, 60, 61]),
            Sequence::new(2, vocab, vec![7]),
        ];
        let mut go = |s: &mut Vec<Sequence>, rows: &[(usize, usize)]| {
            advance(&mut pair, &catalogue, s, rows, &format!("{family} {dtype} {rows:?}"));
        };
        // Batch 1: a prompt at once, then token by token.
        go(&mut s, &[(0, 40)]);
        go(&mut s, &[(0, 1)]);
        go(&mut s, &[(0, 1)]);
        // Batch 4: a chunk beside decoding, a first token, a sequence that shares a block.
        let fork = s[0].fork(3, vocab, vec![20]);
        s.push(fork);
        go(&mut s, &[(0, 1), (1, 33), (2, 1), (3, 5)]);
        go(&mut s, &[(0, 1), (1, 1), (2, 1), (3, 1)]);
        go(&mut s, &[(2, 3), (1, 20), (3, 2), (0, 2)]);
        // Batch 16, twelve of which share the first block.
        for seed in 4..16 {
            let fork = s[0].fork(seed, vocab, vec![17 + seed as u32]);
            s.push(fork);
        }
        let all: Vec<(usize, usize)> = (0..16).map(|i| (i, 1)).collect();
        go(&mut s, &all);
        go(&mut s, &all);
        assert_eq!(pair.compared, 42 + 40 + 4 + 27 + 32, "{family}");
    }
}

crate::common::golden_tests!(check);
