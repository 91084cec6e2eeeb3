//! Manages KV blocks: which sequences hold them, and which full ones can be shared.
//!
//! A block is held by the sequences whose tables list it (its reference count). A full block is
//! remembered under the chain of all tokens before and in it, and stays findable after its last
//! holder left, until its memory is needed. A hit is checked token by token over the *whole*
//! prefix, not only by hash: sharing a block that was computed after another prefix would crash
//! nothing and falsify everything.

use super::hot::{HotPrefix, REUSES_MIN, hottest};
use crate::ops::attention::BLOCK_TOKENS;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::iter;
use std::sync::Arc;

/// Index of a block in the KV cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockId(pub u32);

/// All tokens up to and including one full block: a list that shares its beginning.
#[derive(Debug)]
struct Prefix {
    tokens: [u32; BLOCK_TOKENS],
    before: Option<Arc<Prefix>>,
    salt: u64,
    hash: u64,
}

impl Prefix {
    fn new(before: Option<Arc<Prefix>>, salt: u64, tokens: &[u32]) -> Self {
        let mut hasher = DefaultHasher::new();
        (before.as_ref().map_or(0, |b| b.hash), salt, tokens).hash(&mut hasher);
        let mut own = [0; BLOCK_TOKENS];
        own.copy_from_slice(tokens);
        Self { tokens: own, before, salt, hash: hasher.finish() }
    }

    /// Its tokens from the very beginning.
    fn all_tokens(&self) -> Vec<u32> {
        let blocks: Vec<&Self> = iter::successors(Some(self), |p| p.before.as_deref()).collect();
        blocks.iter().rev().flat_map(|prefix| prefix.tokens).collect()
    }

    /// Whether both stand for the same tokens from the very beginning.
    fn same(a: &Arc<Prefix>, b: &Arc<Prefix>) -> bool {
        let (mut a, mut b) = (a, b);
        loop {
            if Arc::ptr_eq(a, b) {
                return true;
            }
            if a.tokens != b.tokens || a.salt != b.salt {
                return false;
            }
            match (&a.before, &b.before) {
                (Some(x), Some(y)) => (a, b) = (x, y),
                (None, None) => return true,
                _ => return false,
            }
        }
    }
}

impl Drop for Prefix {
    /// Drops what comes before in a loop: by recursion a long list would end the stack.
    fn drop(&mut self) {
        let mut next = self.before.take();
        while let Some(mut prefix) = next.and_then(Arc::into_inner) {
            next = prefix.before.take();
        }
    }
}

#[derive(Default)]
struct Block {
    holders: u32,
    prefix: Option<Arc<Prefix>>,
    used_at: u64, // when the last holder left
    reuses: u32,  // sequences that found it and no block after it
}

/// The blocks of one model.
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,            // never used, or forgotten
    cached: HashMap<u64, BlockId>, // by prefix hash
    idle: BTreeMap<u64, BlockId>,  // unheld but findable, oldest first
    clock: u64,
    has_news: bool, // of reuses, since they were last asked for
}

/// The blocks of one sequence. Dropping it without [`BlockPool::release`] leaks blocks, which
/// the pool's own accounting would show; so it is neither `Clone` nor `Copy`.
#[derive(Default, Debug)]
pub struct BlockTable {
    ids: Vec<BlockId>,
    prefix: Option<Arc<Prefix>>, // of the first `registered` blocks
    registered: usize,
}

impl BlockTable {
    /// The blocks, by position.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Positions that its blocks hold.
    pub fn capacity(&self) -> usize {
        self.ids.len() * BLOCK_TOKENS
    }
}

impl BlockPool {
    /// A pool of `count` free blocks.
    pub fn new(count: usize) -> Self {
        Self {
            blocks: (0..count).map(|_| Block::default()).collect(),
            free: (0..count as u32).rev().map(BlockId).collect(),
            cached: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            has_news: false,
        }
    }

    /// How many blocks there are, held or not.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that no sequence holds.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Starts a table for `tokens`, sharing the full blocks that are still here. At least one
    /// token is left to compute. Returns how many tokens are shared.
    pub fn share(&mut self, table: &mut BlockTable, salt: u64, tokens: &[u32]) -> usize {
        assert!(table.ids.is_empty(), "a table is filled once");
        let full = tokens.len().saturating_sub(1) / BLOCK_TOKENS;
        for chunk in tokens.chunks_exact(BLOCK_TOKENS).take(full) {
            let wanted = Arc::new(Prefix::new(table.prefix.clone(), salt, chunk));
            let Some(id) = self.find(&wanted) else { break };
            self.hold(id);
            table.ids.push(id);
            table.prefix = self.blocks[id.0 as usize].prefix.clone();
            table.registered += 1;
        }
        table.ids.len() * BLOCK_TOKENS
    }

    fn find(&self, wanted: &Arc<Prefix>) -> Option<BlockId> {
        let id = *self.cached.get(&wanted.hash)?;
        let known = self.blocks[id.0 as usize].prefix.as_ref()?;
        Prefix::same(known, wanted).then_some(id)
    }

    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.holders == 0 {
            self.idle.remove(&block.used_at);
        }
        block.holders += 1;
    }

    /// Extends the table to `tokens` positions; false (and nothing changed) when blocks lack.
    pub fn grow(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = tokens.div_ceil(BLOCK_TOKENS).saturating_sub(table.ids.len());
        if missing > self.available() {
            return false;
        }
        for _ in 0..missing {
            let id = self.take();
            self.blocks[id.0 as usize].holders = 1;
            table.ids.push(id);
        }
        true
    }

    /// A block for new content: a free one, else the one unused for longest is forgotten.
    fn take(&mut self) -> BlockId {
        if let Some(id) = self.free.pop() {
            return id;
        }
        let (_, id) = self.idle.pop_first().unwrap_or_else(|| unreachable!("counted by `grow`"));
        let block = &mut self.blocks[id.0 as usize];
        block.reuses = 0;
        if let Some(prefix) = block.prefix.take() {
            self.cached.remove(&prefix.hash);
        }
        id
    }

    /// Counts that a sequence started with what it shares by `table`.
    pub fn note_reuse(&mut self, table: &BlockTable) {
        let Some(last) = table.registered.checked_sub(1) else { return };
        let block = &mut self.blocks[table.ids[last].0 as usize];
        block.reuses = block.reuses.saturating_add(1);
        self.has_news |= block.prefix.as_ref().is_some_and(|prefix| prefix.salt == 0);
    }

    /// The unsalted prefixes that were reused often enough to be kept; `None` where nothing was
    /// reused since the last call.
    pub fn hot_prefixes(&mut self) -> Option<Vec<HotPrefix>> {
        let of = |block: &Block| {
            let prefix = block.prefix.as_ref().filter(|prefix| prefix.salt == 0)?;
            (block.reuses >= REUSES_MIN)
                .then(|| HotPrefix { reuses: block.reuses, tokens: prefix.all_tokens() })
        };
        let hot = || hottest(self.blocks.iter().filter_map(of).collect());
        std::mem::take(&mut self.has_news).then(hot)
    }

    /// Remembers the blocks of `table` that `tokens` (all computed) fill.
    pub fn register(&mut self, table: &mut BlockTable, salt: u64, tokens: &[u32]) {
        let full = (tokens.len() / BLOCK_TOKENS).min(table.ids.len());
        while table.registered < full {
            let at = table.registered;
            let chunk = &tokens[at * BLOCK_TOKENS..][..BLOCK_TOKENS];
            let prefix = Arc::new(Prefix::new(table.prefix.clone(), salt, chunk));
            let prefix = match self.find(&prefix) {
                // Another sequence computed the same block first; keep its list for ours to share.
                Some(twin) => self.blocks[twin.0 as usize].prefix.clone().unwrap_or(prefix),
                None => {
                    let id = table.ids[at];
                    // Where two prefixes share a hash, the first stays findable.
                    if let Entry::Vacant(entry) = self.cached.entry(prefix.hash) {
                        entry.insert(id);
                        self.blocks[id.0 as usize].prefix = Some(Arc::clone(&prefix));
                    }
                    prefix
                }
            };
            table.prefix = Some(prefix);
            table.registered += 1;
        }
    }

    /// Gives all blocks of a table back.
    pub fn release(&mut self, table: &mut BlockTable) {
        let table = std::mem::take(table);
        // Last block first, so that the beginning of a prefix outlives its end.
        for id in table.ids.into_iter().rev() {
            self.clock += 1;
            let block = &mut self.blocks[id.0 as usize];
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.prefix.is_some() {
                block.used_at = self.clock;
                self.idle.insert(self.clock, id);
            } else {
                self.free.push(id);
            }
        }
    }

    /// Panics unless every block is free, idle or held, its count matches `tables`, and every
    /// remembered block is found under its own prefix.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut holders = vec![0; self.blocks.len()];
        for table in tables {
            table.ids.iter().for_each(|id| holders[id.0 as usize] += 1);
        }
        let mut places = vec![0; self.blocks.len()];
        self.free.iter().chain(self.idle.values()).for_each(|id| places[id.0 as usize] += 1);
        for (i, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[i], "block {i}: wrong reference count");
            let unheld = u32::from(block.holders == 0);
            assert_eq!(
                places[i], unheld,
                "block {i}: {} holders, in {} lists",
                holders[i], places[i]
            );
            if let Some(prefix) = &block.prefix {
                assert_eq!(self.cached.get(&prefix.hash), Some(&BlockId(i as u32)), "block {i}");
                let again = Prefix::new(prefix.before.clone(), prefix.salt, &prefix.tokens);
                assert_eq!(prefix.hash, again.hash, "block {i}: hash of other tokens");
            }
        }
        for id in self.cached.values() {
            assert!(self.blocks[id.0 as usize].prefix.is_some(), "{id:?} is cached but unknown");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(blocks: &[u32]) -> Vec<u32> {
        blocks.iter().flat_map(|b| [*b; BLOCK_TOKENS]).chain([9]).collect()
    }

    /// Computes `tokens` as a sequence would, and lets it go.
    fn compute(pool: &mut BlockPool, salt: u64, tokens: &[u32]) -> usize {
        let mut table = BlockTable::default();
        let shared = pool.share(&mut table, salt, tokens);
        assert!(pool.grow(&mut table, tokens.len()));
        pool.register(&mut table, salt, tokens);
        pool.check([&table].into_iter());
        pool.release(&mut table);
        pool.check([].into_iter());
        shared
    }

    #[test]
    fn a_prefix_is_shared_and_one_token_is_always_left() {
        let mut pool = BlockPool::new(8);
        assert_eq!(compute(&mut pool, 0, &tokens(&[1, 2])), 0);
        assert_eq!(compute(&mut pool, 0, &tokens(&[1, 2])), 64);
        assert_eq!(compute(&mut pool, 0, &tokens(&[1, 3])), 32);
        assert_eq!(compute(&mut pool, 0, &tokens(&[1, 2])[..64]), 32);
        assert_eq!(compute(&mut pool, 7, &tokens(&[1, 2])), 0, "another salt shares nothing");
    }

    #[test]
    fn a_long_prefix_is_dropped_on_a_small_stack_and_a_shared_part_stays() {
        let dropped = || {
            let mut middle = None;
            let mut last = None;
            for place in 0..200_000 {
                last = Some(Arc::new(Prefix::new(last, 0, &[place; BLOCK_TOKENS])));
                if place == 9 {
                    middle.clone_from(&last);
                }
            }
            drop(last);
            middle.map(|prefix| prefix.all_tokens().len())
        };
        let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(dropped).unwrap();
        assert_eq!(thread.join().unwrap(), Some(10 * BLOCK_TOKENS));
    }

    #[test]
    fn equal_tokens_after_another_prefix_are_not_shared() {
        let mut pool = BlockPool::new(16);
        compute(&mut pool, 0, &tokens(&[1, 2]));
        compute(&mut pool, 0, &tokens(&[1, 3]));
        assert_eq!(compute(&mut pool, 0, &tokens(&[3, 2])), 0);
    }

    #[test]
    fn the_oldest_idle_block_is_forgotten_first() {
        let mut pool = BlockPool::new(4);
        compute(&mut pool, 0, &tokens(&[1]));
        compute(&mut pool, 0, &tokens(&[2]));
        compute(&mut pool, 0, &tokens(&[3, 4]));
        assert_eq!(compute(&mut pool, 0, &tokens(&[2])), 32);
        assert_eq!(compute(&mut pool, 0, &tokens(&[1])), 0);
    }

    #[test]
    fn prefixes_that_many_found_are_hot_and_salted_ones_never() {
        let mut pool = BlockPool::new(8);
        let found = |pool: &mut BlockPool, salt: u64, blocks: &[u32]| {
            let mut table = BlockTable::default();
            let tokens = tokens(blocks);
            pool.share(&mut table, salt, &tokens);
            pool.note_reuse(&table);
            assert!(pool.grow(&mut table, tokens.len()));
            pool.register(&mut table, salt, &tokens);
            pool.release(&mut table);
        };
        (0..9).for_each(|_| found(&mut pool, 7, &[5]));
        assert_eq!(pool.hot_prefixes(), None, "salted");
        // Others go on after the block that all share.
        (0..REUSES_MIN).for_each(|i| found(&mut pool, 0, &[1, 20 + i]));
        assert_eq!(pool.hot_prefixes(), Some(vec![]), "the first found nothing");
        found(&mut pool, 0, &[1, 2]);
        let hot = HotPrefix { reuses: REUSES_MIN, tokens: vec![1; BLOCK_TOKENS] };
        assert_eq!(pool.hot_prefixes(), Some(vec![hot]));
        assert_eq!(pool.hot_prefixes(), None, "nothing was found since");
        // Forgotten with its block.
        (30..38).for_each(|token| found(&mut pool, 0, &[token, token]));
        pool.has_news = true;
        assert_eq!(pool.hot_prefixes(), Some(vec![]));
    }

    #[test]
    fn growth_beyond_the_pool_changes_nothing() {
        let mut pool = BlockPool::new(2);
        let mut table = BlockTable::default();
        assert!(pool.grow(&mut table, 40));
        assert!(!pool.grow(&mut table, 65));
        assert_eq!((table.ids().len(), pool.available()), (2, 0));
        pool.release(&mut table);
    }
}
