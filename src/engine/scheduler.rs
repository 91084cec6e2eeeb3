//! Decides which rows run in the next step. It is a pure state machine over tokens, counts and
//! blocks.
//!
//! Each step takes one row of every sequence that is past its prefill, then fills the token budget
//! with prefill chunks, oldest first. A sequence that cannot get a block preempts the youngest
//! running one, whose tokens are kept and recomputed later (often from the prefix cache). A request
//! that could never fit is refused at submission, so a lone sequence always makes progress.
//!
//! The owner who runs least is next. Where there is no room for it and another owner runs two
//! sequences more, that owner's newest one is preempted: nobody waits for the end of an answer of
//! somebody who has several. The oldest running sequence is never the one, so all end.
//!
//! A sequence whose prompt begins with what a row of this very step computes waits for the next
//! step and finds it in the prefix cache: many requests with one system prompt compute it once.
//!
//! A sequence that repeats itself may run ahead: the tokens that followed the same few tokens
//! before are guessed ([`drafts`]) and computed as rows of the same step. A draft
//! counts once the row before it has drawn that very token ([`Scheduler::accept`]), so drafts
//! change how many steps an answer takes and nothing else. They use blocks that a sequence has
//! already.
//!
//! No clock, no tensors, no channels: `tests/engine/scheduler_sim.rs` drives it from a seed.

pub use super::admission::{NewSequence, Owner, Refusal, SchedulerLimits};
use super::blocks::{BlockPool, BlockTable};
use super::drafts::{self, DraftCount};
use super::hot::HotPrefix;
pub use super::slice::{Plan, SequenceId, Slice};
use crate::ops::attention::BLOCK_TOKENS;
use std::collections::{BTreeMap, VecDeque};

struct Sequence {
    id: SequenceId,
    owner: Owner,
    tokens: Vec<u32>,
    computed: usize, // tokens whose keys and values are in the cache
    growth_max: usize,
    salt: u64,
    reads_cache: bool,
    table: BlockTable,
    cached_tokens: usize,     // found in the prefix cache when first admitted
    pace: Option<DraftCount>, // of its drafts, where it has any
    has_run: bool,
    is_warmup: bool,
}

impl Sequence {
    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// Sequences, their blocks, and the order in which they run.
pub struct Scheduler {
    limits: SchedulerLimits,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>, // oldest first
    preemptions: u64,
    drafted: u64,
    accepted: u64,
}

/// What the scheduler holds and has done, in numbers.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct SchedulerLoad {
    /// Sequences that take part in steps.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Blocks held by sequences.
    pub blocks_used: usize,
    /// Blocks of the KV cache, used or not.
    pub blocks_total: usize,
    /// How often a sequence lost its blocks to another one.
    pub preemptions: u64,
    /// Tokens that were guessed.
    pub drafted: u64,
    /// Of those, the ones that came true.
    pub accepted: u64,
}

impl Scheduler {
    /// An empty scheduler over `blocks` KV blocks.
    pub fn new(limits: SchedulerLimits, blocks: usize) -> Self {
        assert!(limits.step_tokens_max > 0 && limits.sequences_max > 0 && blocks > 0);
        assert!(limits.mixed_tokens_max > limits.sequences_max, "prefill must make progress");
        Self {
            limits,
            pool: BlockPool::new(blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            preemptions: 0,
            drafted: 0,
            accepted: 0,
        }
    }

    /// One of the same sizes that holds nothing.
    pub fn emptied(&self) -> Self {
        Self::new(self.limits, self.pool.total())
    }

    /// Whether a sequence of these sizes would be accepted.
    ///
    /// # Errors
    /// The reason why not.
    pub fn can_accept(&self, tokens: usize, growth_max: usize) -> Result<(), Refusal> {
        if tokens == 0 {
            return Err(Refusal::Empty);
        }
        // The last token that is pushed is never computed.
        let tokens = tokens.saturating_add(growth_max.saturating_sub(1));
        if tokens > self.limits.context_max {
            return Err(Refusal::Context { tokens, limit: self.limits.context_max });
        }
        let limit = self.pool.total() * BLOCK_TOKENS;
        if tokens > limit {
            return Err(Refusal::Memory { tokens, limit });
        }
        if self.waiting.len() >= self.limits.waiting_max {
            return Err(Refusal::QueueFull { waiting: self.limits.waiting_max });
        }
        Ok(())
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// As for [`can_accept`](Self::can_accept).
    pub fn submit(&mut self, new: NewSequence) -> Result<(), Refusal> {
        self.can_accept(new.tokens.len(), new.growth_max)?;
        self.waiting.push_back(Sequence {
            id: new.id,
            owner: new.owner,
            tokens: new.tokens,
            computed: 0,
            growth_max: new.growth_max,
            salt: new.salt,
            reads_cache: new.reads_cache,
            table: BlockTable::default(),
            cached_tokens: 0,
            pace: (new.is_drafted && self.limits.drafts_max > 0).then(DraftCount::default),
            has_run: false,
            is_warmup: new.is_warmup,
        });
        Ok(())
    }

    /// Chooses the rows of the next step and reserves their blocks.
    pub fn schedule(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.plan_decodes(&mut plan);
        let budget = match plan.slices.is_empty() {
            true => self.limits.step_tokens_max,
            false => self.limits.mixed_budget(plan.rows()),
        };
        self.plan_drafts(&mut plan, budget);
        self.plan_prefills(&mut plan, budget);
        self.admit(&mut plan, budget);
        plan
    }

    /// One row of every sequence that has exactly one token to compute.
    fn plan_decodes(&mut self, plan: &mut Plan) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].pending() == 1 && self.secure(index, 1, plan) {
                plan.slices.push(self.slice(index, 1));
            }
            // `secure` may have preempted this very sequence, the last of the list.
            index += 1;
        }
    }

    /// Appends drafts to the sequences that decode, in at most half of the rows that are left.
    fn plan_drafts(&mut self, plan: &mut Plan, budget: usize) {
        let room = budget.saturating_sub(plan.rows()) / 2;
        let mut room = room.min(drafts::STEP_ROWS_MAX.saturating_sub(plan.slices.len()));
        for slice in &mut plan.slices {
            let Some(sequence) = self.running.iter_mut().find(|s| s.id == slice.id) else {
                continue;
            };
            // A last draft would be followed by a token more than it may have.
            let growth = sequence.growth_max.saturating_sub(1);
            let held = sequence.table.capacity() - sequence.tokens.len();
            let Some(pace) = &mut sequence.pace else { continue };
            let count = pace.next(self.limits.drafts_max).min(growth).min(held).min(room);
            let guessed = drafts::guess(&sequence.tokens, count);
            pace.drafted(guessed.len());
            room -= guessed.len();
            slice.drafts = guessed.len();
            slice.tokens.extend(guessed);
        }
    }

    /// Chunks of running sequences that still have tokens to compute.
    fn plan_prefills(&mut self, plan: &mut Plan, budget: usize) {
        let mut index = 0;
        while index < self.running.len() {
            let room = budget.saturating_sub(plan.rows());
            let pending = self.running[index].pending();
            let planned = plan.slices.iter().any(|s| s.id == self.running[index].id);
            let count = pending.min(room);
            if count > 0 && !planned && self.secure(index, count, plan) {
                plan.slices.push(self.slice(index, count));
            }
            index += 1;
        }
    }

    /// Starts waiting sequences while rows and blocks last.
    fn admit(&mut self, plan: &mut Plan, budget: usize) {
        if !plan.preempted.is_empty() {
            return;
        }
        while plan.rows() < budget {
            let running = self.running_by_owner();
            let Some(next) = self.next_waiting(&running, plan) else { return };
            let owner = self.waiting[next].owner;
            let is_started = self.running.len() < self.limits.sequences_max
                && self.start(next, budget - plan.rows(), plan);
            if !is_started && !self.preempt_for(owner, &running, plan) {
                return;
            }
        }
    }

    /// How many sequences of each owner run.
    fn running_by_owner(&self) -> BTreeMap<Owner, usize> {
        let mut counts = BTreeMap::new();
        if !self.waiting.is_empty() {
            self.running.iter().for_each(|s| *counts.entry(s.owner).or_default() += 1);
        }
        counts
    }

    /// Of the owner that runs least, the sequence that waits longest. What this plan preempted
    /// waits for the next one.
    fn next_waiting(&self, running: &BTreeMap<Owner, usize>, plan: &Plan) -> Option<usize> {
        let runs = |owner| running.get(owner).copied().unwrap_or(0);
        let waiting = self.waiting.iter().enumerate();
        let may_start = |s: &Sequence| !plan.preempted.contains(&s.id) && !self.is_due(plan, s);
        let candidates = waiting.filter(|(_, s)| may_start(s));
        candidates.min_by_key(|(_, s)| runs(&s.owner)).map(|(place, _)| place)
    }

    /// Whether this step computes a block that `new` can share in the next one.
    fn is_due(&self, plan: &Plan, new: &Sequence) -> bool {
        let shares = |slice: &Slice| {
            // The block in which the slice begins is the first that it completes.
            let end = (slice.start / BLOCK_TOKENS + 1) * BLOCK_TOKENS;
            let has_all = slice.start + slice.tokens.len() - slice.drafts >= end;
            let of = |s: &&Sequence| s.id == slice.id && s.salt == new.salt;
            has_all
                && end < new.tokens.len()
                && self
                    .running
                    .iter()
                    .find(of)
                    .is_some_and(|s| s.tokens[..end] == new.tokens[..end])
        };
        new.reads_cache && plan.slices.iter().any(shares)
    }

    /// Starts a waiting sequence, where there are blocks for it.
    fn start(&mut self, place: usize, rows: usize, plan: &mut Plan) -> bool {
        let Some(mut next) = self.waiting.remove(place) else { return false };
        if next.reads_cache {
            next.computed = self.pool.share(&mut next.table, next.salt, &next.tokens);
            // What a preempted sequence finds is its own.
            if !next.has_run {
                next.cached_tokens = next.computed;
            }
        }
        // Memory for all known tokens, so that a new sequence does not preempt at once.
        if !self.pool.grow(&mut next.table, next.tokens.len()) {
            self.pool.release(&mut next.table);
            next.computed = 0;
            self.waiting.insert(place, next);
            return false;
        }
        if !std::mem::replace(&mut next.has_run, true) && !next.is_warmup {
            self.pool.note_reuse(&next.table);
        }
        self.running.push(next);
        let index = self.running.len() - 1;
        let count = self.running[index].pending().min(rows);
        plan.slices.push(self.slice(index, count));
        true
    }

    /// Makes room for a sequence of `owner` where another owner runs two more: its newest one is
    /// preempted.
    fn preempt_for(
        &mut self,
        owner: Owner,
        running: &BTreeMap<Owner, usize>,
        plan: &mut Plan,
    ) -> bool {
        let own = running.get(&owner).copied().unwrap_or(0);
        let Some((most, count)) = running.iter().max_by_key(|(_, count)| **count) else {
            return false;
        };
        let newest = self.running.iter().rposition(|s| s.owner == *most);
        match newest {
            Some(victim) if *count >= own + 2 => {
                self.preempt(victim, plan);
                true
            }
            _ => false,
        }
    }

    /// Makes room for `count` more computed tokens of sequence `index`, preempting from the young
    /// end; false when that was the sequence itself.
    fn secure(&mut self, index: usize, count: usize, plan: &mut Plan) -> bool {
        loop {
            let sequence = &mut self.running[index];
            if self.pool.grow(&mut sequence.table, sequence.computed + count) {
                return true;
            }
            let victim = self.running.len() - 1;
            self.preempt(victim, plan);
            if victim == index {
                return false;
            }
        }
    }

    fn preempt(&mut self, index: usize, plan: &mut Plan) {
        let mut victim = self.running.remove(index);
        self.pool.release(&mut victim.table);
        victim.computed = 0;
        self.preemptions += 1;
        plan.slices.retain(|s| s.id != victim.id);
        plan.preempted.push(victim.id);
        self.waiting.push_front(victim);
    }

    fn slice(&self, index: usize, count: usize) -> Slice {
        let sequence = &self.running[index];
        let end = sequence.computed + count;
        Slice {
            id: sequence.id,
            start: sequence.computed,
            tokens: sequence.tokens[sequence.computed..end].to_vec(),
            is_last: end == sequence.tokens.len(),
            drafts: 0,
            blocks: sequence.table.ids().to_vec(),
        }
    }

    /// Records that a plan was computed. Drafts count for nothing yet.
    pub fn commit(&mut self, plan: &Plan) {
        for slice in &plan.slices {
            self.drafted += slice.drafts as u64;
            let Some(index) = self.position(slice.id) else { continue };
            self.count(index, slice.start + slice.tokens.len() - slice.drafts);
        }
    }

    /// The keys and values of the first `computed` tokens of sequence `index` are in its blocks.
    fn count(&mut self, index: usize, computed: usize) {
        let sequence = &mut self.running[index];
        sequence.computed = computed;
        let computed = &sequence.tokens[..computed];
        self.pool.register(&mut sequence.table, sequence.salt, computed);
    }

    /// Whether the draft of `token` at `position` came true: then its row counts like one that was
    /// planned after `token` was drawn. False too once the sequence is gone.
    pub fn accept(&mut self, id: SequenceId, position: usize, token: u32) -> bool {
        let Some(index) = self.position(id) else { return false };
        let sequence = &mut self.running[index];
        if sequence.computed != position || sequence.tokens.get(position) != Some(&token) {
            return false;
        }
        if let Some(pace) = &mut sequence.pace {
            pace.accepted();
        }
        self.accepted += 1;
        self.count(index, position + 1);
        true
    }

    /// Appends a sampled token.
    ///
    /// # Panics
    /// When the sequence is unknown, has uncomputed tokens, or was promised to grow less.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        let index = self.position(id).unwrap_or_else(|| unreachable!("{id:?} is not running"));
        let sequence = &mut self.running[index];
        assert!(sequence.pending() == 0 && sequence.growth_max > 0);
        sequence.growth_max -= 1;
        sequence.tokens.push(token);
    }

    /// Removes a sequence, finished or not; false when it is unknown.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        if let Some(index) = self.position(id) {
            let mut sequence = self.running.remove(index);
            self.pool.release(&mut sequence.table);
            return true;
        }
        let before = self.waiting.len();
        self.waiting.retain(|s| s.id != id);
        self.waiting.len() < before
    }

    /// Tokens of a sequence that were found in the prefix cache.
    pub fn cached_tokens(&self, id: SequenceId) -> usize {
        self.position(id).map_or(0, |index| self.running[index].cached_tokens)
    }

    /// Whether nothing runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The unsalted prefixes that sequences found in the cache most often; `None` while they are
    /// those of the last call.
    pub fn hot_prefixes(&mut self) -> Option<Vec<HotPrefix>> {
        self.pool.hot_prefixes()
    }

    /// What it holds now and has done so far, in numbers.
    pub fn load(&self) -> SchedulerLoad {
        SchedulerLoad {
            running: self.running.len(),
            waiting: self.waiting.len(),
            blocks_used: self.pool.total() - self.pool.available(),
            blocks_total: self.pool.total(),
            preemptions: self.preemptions,
            drafted: self.drafted,
            accepted: self.accepted,
        }
    }

    fn position(&self, id: SequenceId) -> Option<usize> {
        self.running.iter().position(|s| s.id == id)
    }

    /// Panics when an invariant is broken; for simulations.
    pub fn check(&self, plan: &Plan) {
        self.pool.check(self.running.iter().map(|s| &s.table));
        for sequence in &self.running {
            assert!(sequence.computed <= sequence.tokens.len());
            assert!(sequence.table.capacity() >= sequence.computed);
        }
        assert!(self.waiting.iter().all(|s| s.table.ids().is_empty() && s.computed == 0));
        assert!(self.running.len() <= self.limits.sequences_max);
        let SchedulerLimits { step_tokens_max, mixed_tokens_max, .. } = self.limits;
        assert!(plan.rows() <= step_tokens_max.max(mixed_tokens_max));
        for slice in &plan.slices {
            assert!(slice.blocks.len() * BLOCK_TOKENS >= slice.start + slice.tokens.len());
        }
    }
}
