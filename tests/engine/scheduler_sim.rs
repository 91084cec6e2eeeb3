//! The scheduler driven from seeds: random arrivals, aborts, tiny caches, a two-token vocabulary
//! (which makes prefixes collide sooner). After every step all invariants are checked, and the
//! "KV cache" is simulated: each block remembers the tokens it was computed after, so a block
//! shared across different prefixes is caught even though nothing would crash.

use crate::common::Noise;
use std::collections::HashMap;
use targon_engine::engine::scheduler::{
    NewSequence, Owner, Plan, Refusal, Scheduler, SchedulerLimits, SequenceId, Slice,
};
use targon_engine::ops::attention::BLOCK_TOKENS;

/// What a sequence should look like, kept outside the scheduler.
struct Model {
    owner: Owner,
    salt: u64,
    reads_cache: bool,
    tokens: Vec<u32>,
    growth: usize,
    steps_waited: usize,
}

struct Simulation {
    noise: Noise,
    limits: SchedulerLimits,
    scheduler: Scheduler,
    live: HashMap<SequenceId, Model>,
    /// For each block and slot: the tokens up to and including that position.
    cache: HashMap<(u32, usize), Vec<u32>>,
    next_id: u64,
    finished: usize,
    shared_tokens: usize,
}

impl Simulation {
    fn new(seed: u32) -> Self {
        let mut noise = Noise(seed);
        let sequences_max = 1 + noise.below(6);
        let limits = SchedulerLimits {
            step_tokens_max: 1 + noise.below(100),
            mixed_tokens_max: sequences_max + 1 + noise.below(40),
            sequences_max,
            waiting_max: 1 + noise.below(8),
            context_max: 40 + noise.below(200),
            drafts_max: noise.below(2) * noise.below(8),
        };
        let scheduler = Scheduler::new(limits, 1 + noise.below(12));
        Self {
            noise,
            limits,
            scheduler,
            live: HashMap::new(),
            cache: HashMap::new(),
            next_id: 0,
            finished: 0,
            shared_tokens: 0,
        }
    }

    fn arrive(&mut self) {
        let (count, growth) = (self.noise.below(150), 1 + self.noise.below(60));
        // Runs of equal tokens: prefixes agree often, and often agree after they differed.
        let mut token = 0;
        let tokens: Vec<u32> = (0..count)
            .map(|i| {
                if i % BLOCK_TOKENS == 0 {
                    token = self.noise.below(2) as u32;
                }
                token
            })
            .collect();
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let owner = Owner([self.noise.below(3) as u8; 32]);
        let salt = u64::from(self.noise.below(8) == 0);
        let reads_cache = self.noise.below(5) > 0;
        let new = NewSequence {
            id,
            owner,
            tokens: tokens.clone(),
            growth_max: growth,
            salt,
            reads_cache,
            is_drafted: self.noise.below(4) > 0,
            is_warmup: false,
        };
        match self.scheduler.submit(new) {
            Ok(()) => {
                self.live.insert(
                    id,
                    Model { owner, salt, reads_cache, tokens, growth, steps_waited: 0 },
                );
            }
            Err(Refusal::Empty) => assert_eq!(count, 0),
            Err(_) => {}
        }
    }

    fn abort(&mut self) {
        let mut ids: Vec<SequenceId> = self.live.keys().copied().collect();
        ids.sort_unstable();
        if !ids.is_empty() {
            let id = ids[self.noise.below(ids.len())];
            assert!(self.scheduler.remove(id));
            self.live.remove(&id);
        }
    }

    fn step(&mut self) {
        let plan = self.scheduler.schedule();
        self.scheduler.check(&plan);
        self.check_shares(&plan);
        assert!(!plan.slices.is_empty() || self.live.is_empty(), "nothing runs, but not idle");
        for slice in &plan.slices {
            self.compute(slice);
        }
        self.scheduler.commit(&plan);
        for slice in plan.slices.iter().filter(|s| s.is_last) {
            self.draw_all(slice);
        }
        self.note_waiting(&plan);
        self.scheduler.check(&Plan::default());
    }

    /// Whether the step computes a block of the prompt, which this sequence then finds.
    fn is_due(&self, plan: &Plan, model: &Model) -> bool {
        let computes = |slice: &Slice| {
            let other = &self.live[&slice.id];
            let blocks = slice.start / BLOCK_TOKENS + 1;
            let known = slice.start + slice.tokens.len() - slice.drafts;
            let end = blocks * BLOCK_TOKENS;
            known >= end && model.tokens.len() > end && other.salt == model.salt && {
                model.tokens.iter().zip(&other.tokens).take(end).all(|(a, b)| a == b)
            }
        };
        model.reads_cache && plan.slices.iter().any(computes)
    }

    /// Nobody waits while another owner runs several, but for the step in which room is made or
    /// the beginning of its prompt is computed.
    fn check_shares(&self, plan: &Plan) {
        let decodes = plan.slices.iter().filter(|slice| slice.tokens.len() - slice.drafts == 1);
        let budget = self.limits.mixed_budget(decodes.count());
        if !plan.preempted.is_empty() || plan.rows() >= budget {
            return;
        }
        let mut running: HashMap<Owner, usize> = HashMap::new();
        for slice in &plan.slices {
            *running.entry(self.live[&slice.id].owner).or_default() += 1;
        }
        let most = running.values().copied().max().unwrap_or(0);
        for (id, model) in &self.live {
            let own = running.get(&model.owner).copied().unwrap_or(0);
            let is_running = plan.slices.iter().any(|slice| slice.id == *id);
            assert!(
                is_running || own + 2 > most || self.is_due(plan, model),
                "{id:?} waits: {own} of its owner run, {most} of another"
            );
        }
    }

    /// Writes the slice's positions and reads every position before them, as attention does.
    fn compute(&mut self, slice: &Slice) {
        let mut tokens = self.live[&slice.id].tokens.clone();
        let (known, drafts) = slice.tokens.split_at(slice.tokens.len() - slice.drafts);
        let end = slice.start + known.len();
        assert_eq!(&tokens[slice.start..end], known, "rows of other tokens");
        assert_eq!(slice.is_last, end == tokens.len());
        assert!(drafts.is_empty() || (slice.is_last && known.len() == 1), "drafts of a prefill");
        assert!(drafts.len() <= self.limits.drafts_max.min(self.live[&slice.id].growth - 1));
        tokens.extend(drafts);
        let end = end + drafts.len();
        let place =
            |position: usize| (slice.blocks[position / BLOCK_TOKENS].0, position % BLOCK_TOKENS);
        for position in slice.start..end {
            self.cache.insert(place(position), tokens[..=position].to_vec());
        }
        for position in 0..slice.start {
            let stored = self.cache.get(&place(position)).map(Vec::as_slice);
            assert_eq!(stored, Some(&tokens[..=position]), "position {position} of another prefix");
        }
        self.shared_tokens += self.scheduler.cached_tokens(slice.id);
    }

    /// Draws after the last known token, and after each draft that came true.
    fn draw_all(&mut self, slice: &Slice) {
        self.draw(slice.id);
        let known = slice.tokens.len() - slice.drafts;
        for (index, token) in slice.tokens.iter().enumerate().skip(known) {
            let position = slice.start + index;
            let drawn = self.live.get(&slice.id).map(|model| model.tokens[position]);
            let is_true = self.scheduler.accept(slice.id, position, *token);
            assert_eq!(is_true, drawn == Some(*token), "a draft at {position}");
            if !is_true {
                let again = self.scheduler.accept(slice.id, position + 1, *token);
                return assert!(!again, "a draft after one that did not come true");
            }
            self.draw(slice.id);
        }
    }

    fn draw(&mut self, id: SequenceId) {
        let model = self.live.get_mut(&id).unwrap();
        model.growth -= 1;
        if model.growth == 0 || self.noise.below(20) == 0 {
            self.live.remove(&id);
            assert!(self.scheduler.remove(id));
            self.finished += 1;
            return;
        }
        let token = self.noise.below(2) as u32;
        model.tokens.push(token);
        self.scheduler.push(id, token);
    }

    fn note_waiting(&mut self, plan: &Plan) {
        for (id, model) in &mut self.live {
            let ran = plan.slices.iter().any(|s| s.id == *id);
            model.steps_waited = if ran { 0 } else { model.steps_waited + 1 };
            assert!(model.steps_waited < 3_000, "{id:?} starves");
        }
    }
}

#[test]
fn random_workloads_keep_every_invariant_and_finish() {
    let (mut finished, mut shared, mut preempted) = (0, 0, 0);
    let (mut drafted, mut accepted) = (0, 0);
    for seed in 0..800 {
        println!("seed {seed}");
        let mut simulation = Simulation::new(seed);
        for _ in 0..150 {
            match simulation.noise.below(10) {
                0..3 => simulation.arrive(),
                3 => simulation.abort(),
                _ => simulation.step(),
            }
        }
        let mut rounds = 0;
        while !simulation.live.is_empty() {
            simulation.step();
            rounds += 1;
            assert!(rounds < 20_000, "seed {seed} does not drain");
        }
        assert!(simulation.scheduler.is_idle());
        assert_eq!(simulation.scheduler.load().blocks_used, 0, "seed {seed} leaks blocks");
        finished += simulation.finished;
        shared += simulation.shared_tokens;
        let load = simulation.scheduler.load();
        preempted += load.preemptions;
        drafted += load.drafted;
        accepted += load.accepted;
    }
    // The workload must reach what it is meant to test.
    assert!(
        finished > 2_000 && shared > 10_000 && preempted > 200,
        "{finished} {shared} {preempted}"
    );
    assert!(accepted > 2_000 && drafted > accepted + 2_000, "{drafted} {accepted}");
}

/// Limits of `sequences_max` sequences without drafts, in steps of so many rows.
fn limits((step, mixed): (usize, usize), sequences_max: usize) -> SchedulerLimits {
    SchedulerLimits {
        step_tokens_max: step,
        mixed_tokens_max: mixed,
        sequences_max,
        waiting_max: 8,
        context_max: 400,
        drafts_max: 0,
    }
}

#[test]
fn a_prompt_larger_than_the_cache_is_refused_and_the_rest_runs() {
    let limits = SchedulerLimits { waiting_max: 4, context_max: 1_000, ..limits((64, 64), 4) };
    let mut scheduler = Scheduler::new(limits, 4);
    let sequence = |id: u64, count: usize, growth_max: usize| NewSequence {
        id: SequenceId(id),
        owner: Owner::default(),
        tokens: vec![1; count],
        growth_max,
        salt: 0,
        reads_cache: true,
        is_drafted: false,
        is_warmup: false,
    };
    assert_eq!(
        scheduler.submit(sequence(0, 129, 1)),
        Err(Refusal::Memory { tokens: 129, limit: 128 })
    );
    assert_eq!(
        scheduler.submit(sequence(1, 1, 1_001)),
        Err(Refusal::Context { tokens: 1_001, limit: 1_000 })
    );
    assert_eq!(scheduler.submit(sequence(2, 128, 1)), Ok(()));
    let plan = scheduler.schedule();
    assert_eq!((plan.rows(), plan.slices[0].is_last), (64, false));
    scheduler.commit(&plan);
    assert!(scheduler.schedule().slices[0].is_last);
}

#[test]
fn a_prompt_that_begins_as_another_waits_one_step_and_computes_only_its_own_end() {
    let limits = limits((512, 512), 8);
    let mut scheduler = Scheduler::new(limits, 64);
    let sequence = |id: u64, salt: u64, reads_cache: bool| NewSequence {
        id: SequenceId(id),
        owner: Owner::default(),
        tokens: [vec![1; 100], vec![id as u32; 8]].concat(),
        growth_max: 9,
        salt,
        reads_cache,
        is_drafted: false,
        is_warmup: false,
    };
    for (id, salt, reads_cache) in
        [(2, 0, true), (3, 0, true), (4, 5, true), (5, 0, false), (6, 5, true), (7, 0, true)]
    {
        scheduler.submit(sequence(id, salt, reads_cache)).unwrap();
    }
    // One of each salt, and the one that reads no cache.
    let rows = |plan: &Plan| -> Vec<(u64, usize)> {
        plan.slices.iter().map(|s| (s.id.0, s.tokens.len())).collect()
    };
    assert_eq!(rows(&step(&mut scheduler)), [(2, 108), (4, 108), (5, 108)]);
    let later = [(2, 1), (4, 1), (5, 1), (3, 12), (6, 12), (7, 12)];
    assert_eq!(rows(&step(&mut scheduler)), later);
    assert_eq!(scheduler.cached_tokens(SequenceId(7)), 96);
    assert_eq!(scheduler.hot_prefixes(), Some(vec![]), "two are too few");
    scheduler.submit(sequence(8, 0, true)).unwrap();
    step(&mut scheduler);
    let hot = scheduler.hot_prefixes().unwrap();
    assert_eq!((hot.len(), hot[0].reuses, hot[0].tokens.clone()), (1, 3, vec![1; 96]));
}

/// Runs one step in which every sequence that is past its prefill draws a token.
fn step(scheduler: &mut Scheduler) -> Plan {
    let plan = scheduler.schedule();
    scheduler.check(&plan);
    scheduler.commit(&plan);
    plan.slices.iter().filter(|s| s.is_last).for_each(|s| scheduler.push(s.id, 1));
    plan
}

fn ids(plan: &Plan) -> Vec<u64> {
    plan.slices.iter().map(|slice| slice.id.0).collect()
}

#[test]
fn the_newest_of_an_owner_with_several_gives_way_at_once_and_goes_on_later() {
    let limits = limits((64, 64), 2);
    let mut scheduler = Scheduler::new(limits, 64);
    let sequence = |id: u64, owner: u8, growth_max: usize| NewSequence {
        id: SequenceId(id),
        owner: Owner([owner; 32]),
        tokens: vec![1; 8],
        growth_max,
        salt: id,
        reads_cache: true,
        is_drafted: false,
        is_warmup: false,
    };
    for id in 0..4 {
        scheduler.submit(sequence(id, 1, 300)).unwrap();
    }
    assert_eq!(ids(&step(&mut scheduler)), [0, 1]);
    (0..40).for_each(|_| drop(step(&mut scheduler)));
    // The loud one's own others wait as before; the quiet one runs in the very next step.
    scheduler.submit(sequence(4, 2, 2)).unwrap();
    scheduler.submit(sequence(5, 3, 300)).unwrap();
    let plan = step(&mut scheduler);
    assert_eq!((ids(&plan), plan.preempted), (vec![0, 4], vec![SequenceId(1)]));
    // A third owner waits for a slot, as each of the two runs one only, but before the loud one.
    assert_eq!(ids(&step(&mut scheduler)), [0, 4]);
    scheduler.remove(SequenceId(4));
    assert_eq!(ids(&step(&mut scheduler)), [0, 5]);
    scheduler.remove(SequenceId(5));
    let plan = step(&mut scheduler);
    assert_eq!(ids(&plan), [0, 1]);
    // Some of its 49 tokens are still in the prefix cache.
    let resumed = &plan.slices[1];
    assert_eq!((resumed.start, resumed.start + resumed.tokens.len()), (32, 49));
}

#[test]
fn prefills_go_on_however_many_sequences_decode() {
    let limits = SchedulerLimits { waiting_max: 700, ..limits((512, 728), 600) };
    let mut scheduler = Scheduler::new(limits, 2_000);
    let sequence = |id: u64, owner: u8, tokens: usize| NewSequence {
        id: SequenceId(id),
        owner: Owner([owner; 32]),
        tokens: vec![1; tokens],
        growth_max: 100,
        salt: id,
        reads_cache: true,
        is_drafted: false,
        is_warmup: false,
    };
    (0..560).for_each(|id| scheduler.submit(sequence(id, 1, 1)).unwrap());
    let rows: Vec<usize> = (0..3).map(|_| step(&mut scheduler).rows()).collect();
    assert_eq!(rows, [512, 560, 560]);
    scheduler.submit(sequence(600, 2, 150)).unwrap();
    // The newcomer gets 128 rows beside all that decode.
    assert_eq!(step(&mut scheduler).rows(), 560 + 128);
    assert_eq!(step(&mut scheduler).rows(), 560 + 22);
}

#[test]
fn a_preempted_sequence_was_not_found_in_the_cache() {
    let limits = limits((512, 512), 2);
    let mut scheduler = Scheduler::new(limits, 64);
    let sequence = |id: u64, owner: u8| NewSequence {
        id: SequenceId(id),
        owner: Owner([owner; 32]),
        tokens: vec![id as u32; 100],
        growth_max: 50,
        salt: 0,
        reads_cache: true,
        is_drafted: false,
        is_warmup: false,
    };
    (0..2).for_each(|id| scheduler.submit(sequence(id, 1)).unwrap());
    step(&mut scheduler);
    // Another owner takes the place of the second one, and gives it back.
    scheduler.submit(sequence(2, 2)).unwrap();
    assert_eq!(step(&mut scheduler).preempted, [SequenceId(1)]);
    scheduler.remove(SequenceId(2));
    let plan = step(&mut scheduler);
    let again = plan.slices.iter().find(|slice| slice.id == SequenceId(1)).unwrap();
    assert!(again.start >= 96, "it finds its own blocks");
    assert_eq!(scheduler.cached_tokens(SequenceId(1)), 0);
}
