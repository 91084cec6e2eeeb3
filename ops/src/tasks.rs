//! Splits a product of (blocks x tokens) into tasks for threads.
//!
//! A block's weights are read from memory once for each of its tasks, so tasks have many tokens.
//! Blocks that are left over once every thread has as many as the others are cut into halves by
//! their outputs where that makes the slowest thread faster: nine blocks on two threads are four
//! and a half for each.

use std::ops::Range;

/// Tasks for each thread, so that others can take those of a slow one.
const TASKS_WANTED: usize = 12;

/// How a product may be cut.
#[derive(Clone, Copy)]
pub(super) struct Grain {
    /// Tokens of a task below which reading its weights costs more than it gains.
    pub tokens: usize,
    /// Tokens are cut at multiples of this.
    pub step: usize,
    /// Parts that a block's outputs can be cut into.
    pub parts: usize,
}

/// One task: a part of a block's outputs, of so many parts, for these tokens.
#[derive(Debug)]
pub(super) struct Task {
    pub block: usize,
    pub part: usize,
    pub parts: usize,
    pub tokens: Range<usize>,
}

/// The tasks of a product. Those of one thread lie together, as a pool deals them out.
pub(super) struct Tasks {
    threads: usize,
    tokens: usize,
    own: Cut,
    left: Cut,
}

/// So many blocks from `first` on in `parts`, each in `pieces` of at most `size` tokens.
struct Cut {
    first: usize,
    blocks: usize,
    parts: usize,
    pieces: usize,
    size: usize,
}

impl Tasks {
    /// For `blocks` of `tokens` on `threads`.
    pub(super) fn of(threads: usize, grain: Grain, blocks: usize, tokens: usize) -> Self {
        let wanted = (threads * TASKS_WANTED).div_ceil(blocks.max(1));
        let pieces = wanted.min(tokens.div_ceil(grain.tokens)).max(1);
        let size = tokens.div_ceil(pieces).next_multiple_of(grain.step).max(1);
        let pieces = tokens.div_ceil(size);
        let left = blocks % threads;
        // The slowest thread's share of a block, times a number that does not depend on the parts.
        let slowest =
            |parts: &usize| (left * pieces * parts).div_ceil(threads) * (grain.parts / parts);
        let parts = (1..=grain.parts).min_by_key(slowest).unwrap_or(1);
        let cut = |blocks: Range<usize>, parts| Cut {
            first: blocks.start,
            blocks: blocks.len(),
            parts,
            pieces,
            size,
        };
        Self {
            threads,
            tokens,
            own: cut(0..blocks - left, 1),
            left: cut(blocks - left..blocks, parts),
        }
    }

    /// Number of tasks; some may be empty.
    pub(super) fn count(&self) -> usize {
        self.threads * (self.own_each() + self.left_each())
    }

    /// A task by its number.
    pub(super) fn get(&self, task: usize) -> Option<Task> {
        let (own, left) = (self.own_each(), self.left_each());
        let (thread, i) = (task / (own + left), task % (own + left));
        match i.checked_sub(own) {
            None => self.own.get(thread * own + i, self.tokens),
            Some(i) => self.left.get(thread * left + i, self.tokens),
        }
    }

    fn own_each(&self) -> usize {
        self.own.count() / self.threads
    }

    fn left_each(&self) -> usize {
        self.left.count().div_ceil(self.threads)
    }
}

impl Cut {
    fn count(&self) -> usize {
        self.blocks * self.parts * self.pieces
    }

    /// All blocks with their first tokens, then with their next ones.
    fn get(&self, i: usize, tokens: usize) -> Option<Task> {
        if i >= self.count() {
            return None;
        }
        let (piece, i) = (i / (self.blocks * self.parts), i % (self.blocks * self.parts));
        Some(Task {
            block: self.first + i / self.parts,
            part: i % self.parts,
            parts: self.parts,
            tokens: piece * self.size..((piece + 1) * self.size).min(tokens),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANES: Grain = Grain { tokens: 24, step: 1, parts: 2 };
    const TILES: Grain = Grain { tokens: 32, step: 16, parts: 1 };

    /// Half outputs of a task.
    fn halves(task: &Task) -> Range<usize> {
        let block = 2 * task.block;
        match (task.parts, task.part) {
            (1, 0) => block..block + 2,
            (2, part @ (0 | 1)) => block + part..block + part + 1,
            _ => panic!("{task:?}"),
        }
    }

    /// What each thread begins with: tokens times blocks, times two.
    fn loads(threads: usize, tasks: &Tasks) -> Vec<usize> {
        let count = tasks.count();
        let load = |task: usize| tasks.get(task).map_or(0, |t| t.tokens.len() * halves(&t).len());
        (0..threads)
            .map(|i| (i * count / threads..(i + 1) * count / threads).map(load).sum())
            .collect()
    }

    #[test]
    fn every_token_of_every_output_is_in_one_task() {
        for (threads, grain) in [1, 2, 3, 8, 64].into_iter().flat_map(|t| [(t, LANES), (t, TILES)])
        {
            for blocks in [1, 2, 7, 9, 15, 24, 768] {
                for tokens in [0, 1, 3, 4, 16, 33, 512, 513] {
                    let tasks = Tasks::of(threads, grain, blocks, tokens);
                    let mut seen = vec![0; 2 * blocks * tokens];
                    for task in (0..tasks.count()).filter_map(|task| tasks.get(task)) {
                        for half in halves(&task) {
                            task.tokens.clone().for_each(|token| seen[half * tokens + token] += 1);
                        }
                    }
                    assert!(seen.iter().all(|n| *n == 1), "{threads} {blocks} {tokens}");
                }
            }
        }
    }

    #[test]
    fn threads_begin_with_about_the_same_load() {
        for (threads, grain, blocks, tokens, most) in [
            (2, LANES, 9, 1, 9),
            (2, LANES, 9, 16, 9 * 16),
            (2, LANES, 15, 32, 15 * 32),
            (2, LANES, 24, 512, 24 * 512),
            (8, LANES, 9, 16, 2 * 16 + 16),
            (8, LANES, 7, 16, 2 * 16),
            (2, LANES, 9, 512, 9 * 512 + 9), // pieces of 171, 171 and 170
            (2, TILES, 9, 16, 2 * 5 * 16),
            (2, TILES, 9, 64, 9 * 64),
        ] {
            let loads = loads(threads, &Tasks::of(threads, grain, blocks, tokens));
            assert_eq!(loads.iter().max(), Some(&most), "{threads} {blocks} {tokens}: {loads:?}");
        }
    }
}
