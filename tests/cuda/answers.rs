//! Every way to ask of a row, on the card and on the CPU.

use crate::common::{Noise, tiny_config, write_checkpoint};
use crate::{Counter, Pair, count, is_same};
use llguidance::toktrie::SimpleVob;
use std::collections::BTreeMap;
use std::sync::Arc;
use targon_engine::models::pass::{Batch, LogprobMode, Near, Pass, RowAsk, Scores, Token};
use targon_engine::models::rules::{RowRules, Seen};
use targon_engine::models::sampler::Sampling;
use targon_engine::proof::Scheme;
use targon_engine::proof::commit::RowProver;
use targon_engine::proof::residue::Calibration;

/// Kinds of asks.
pub(crate) const KINDS: usize = 18;

/// What asks refer to.
pub(crate) struct Catalogue {
    samplings: Vec<Sampling>,
    provers: [RowProver; 3],
    ends: [u32; 3],
    vocab: u32,
}

impl Catalogue {
    pub(crate) fn new(vocab: usize, hidden: usize, key: u64) -> Self {
        let base = Sampling { temperature: 1.0, noise_key: key, ..Sampling::greedy() };
        let greedy = Sampling::greedy();
        let samplings = vec![
            greedy.clone(),
            Sampling { temperature: 0.8, ..base.clone() },
            Sampling { temperature: 1.2, top_k: 5, ..base.clone() },
            Sampling { top_p: 0.9, ..base.clone() },
            Sampling { temperature: 0.7, min_p: 0.1, ..base.clone() },
            base.clone(),
            greedy.clone(),
            greedy.clone(),
            Sampling { logit_bias: vec![(3, 4.0), (9, -2.0)], ..base.clone() },
            Sampling { repetition_penalty: 1.3, presence_penalty: 0.4, ..base.clone() },
            base.clone(),
            Sampling { temperature: 0.9, top_p: 0.8, ..base.clone() },
            greedy.clone(),
            Sampling { top_a: 0.2, ..base.clone() },
            greedy.clone(),
            greedy,
            Sampling { temperature: 0.9, top_p: 0.95, top_k: 20, min_p: 0.05, ..base.clone() },
            Sampling { temperature: 3.0, top_p: 0.999, ..base },
        ];
        let calibration = Arc::new(Calibration {
            exponents: (0..hidden).map(|c| (c % 5) as i8 - 2).collect(),
            means: (0..hidden).map(|c| (c % 90) as i16 - 45).collect(),
            shift: 4,
        });
        let prover = |scheme| {
            RowProver::new(scheme, &[key as u8 + scheme as u8; 32], Arc::clone(&calibration))
        };
        Self {
            samplings,
            provers: [Scheme::Residue, Scheme::ResidueU4, Scheme::Toploc].map(prover),
            ends: [1, 2, vocab as u32 - 1],
            vocab: vocab as u32,
        }
    }

    /// An ask of one kind.
    pub(crate) fn ask(&self, row: usize, position: usize, kind: usize) -> RowAsk<'_> {
        let kind = kind % KINDS;
        let ask = RowAsk::new(row, position);
        let scores = Scores::new(Token::Drawn, &self.samplings[kind]);
        let [wide, narrow, bare] = self.provers.each_ref();
        let mut allowed = SimpleVob::alloc(self.vocab as usize);
        (0..self.vocab).step_by(3).for_each(|id| allowed.allow_token(id));
        let seen = Seen::new(&self.samplings[kind], &[1, 2, 3]);
        let near = |reach| Near { ids: vec![9, 4, 9], reach };
        let (prover, scores) = match kind {
            0 => (Some(wide), scores),
            1 => (None, Scores { top: 3, ..scores }),
            2 => (Some(narrow), Scores { mode: LogprobMode::Scaled, ..scores }),
            3 => (None, Scores { top: 5, ids: vec![0, 7], ..scores }),
            4 => {
                (Some(wide), Scores { mode: LogprobMode::Scaled, near: Some(near(None)), ..scores })
            }
            5 => (None, Scores { token: Token::Known(5), top: 4, ends: &self.ends, ..scores }),
            6 => return RowAsk { hidden: true, ..ask },
            7 => (Some(bare), scores),
            8 => (None, Scores { top: 2, ..scores }),
            9 => {
                let rules = RowRules { seen: Arc::new(seen), ..RowRules::default() };
                (Some(wide), Scores { rules, mode: LogprobMode::Scaled, ..scores })
            }
            10 => (
                None,
                Scores {
                    rules: RowRules { allowed: Some(allowed), ..RowRules::default() },
                    ..scores
                },
            ),
            11 => (Some(wide), Scores { token: Token::Measured(3), ends: &self.ends, ..scores }),
            12 => (None, Scores { top: 2, near: Some(near(Some(1.5))), ..scores }),
            13 => (Some(narrow), Scores { top: 1, ..scores }),
            14 => return RowAsk { logits: true, hidden: true, scores: Some(scores), ..ask },
            15 => return RowAsk { prover: Some(wide), ..ask },
            16 => return RowAsk { hidden: true, prover: Some(wide), scores: Some(scores), ..ask },
            _ => (Some(wide), Scores { top: 20, ..scores }),
        };
        RowAsk { prover, scores: Some(scores), ..ask }
    }
}

fn tiny(device: usize, blocks: usize) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), &tiny_config(), 3);
    Pair::new(dir.path(), None, device, blocks)
}

fn ids(count: usize, vocab: usize, seed: u32) -> Vec<u32> {
    let mut noise = Noise(seed);
    (0..count).map(|_| noise.below(vocab) as u32).collect()
}

#[test]
fn every_kind_of_ask_is_answered_alike() {
    let mut pair = tiny(0, 8);
    let ids = ids(2 * KINDS, pair.vocab, 1);
    for key in 0..3 {
        let catalogue = Catalogue::new(pair.vocab, pair.hidden, 40 + key);
        let asks: Vec<RowAsk<'_>> =
            (0..ids.len()).map(|row| catalogue.ask(row, row, row + key as usize)).collect();
        pair.step(&Batch::of(&ids, 0), &asks, &format!("key {key}"));
        // Rows that are asked twice, and in another order.
        let twice: Vec<RowAsk<'_>> =
            (0..KINDS).map(|i| catalogue.ask(i * 7 % 5, i * 7 % 5, i)).collect();
        pair.step(&Batch::of(&ids, 0), &twice, &format!("key {key}, rows twice"));
        // Nobody asks.
        pair.step(&Batch::of(&ids, 0), &[], "no asks");
    }
    assert_eq!(pair.compared, 3 * 3 * KINDS);
    // Each kind was asked nine times. What the host read is counted by why.
    let counted: BTreeMap<&str, u64> = pair.card.hosted().iter().collect();
    let want = [("asked", 9), ("rules", 27), ("margin", 9), ("search", 9), ("top_a", 9)];
    assert_eq!(want.map(|(why, _)| (why, counted[why])), want);
    assert!(counted["alternatives"] == 0 && counted["draw"] > 0, "{counted:?}");
}

#[test]
fn contexts_of_several_partitions_are_split_alike() {
    let mut pair = tiny(0, 40);
    let ids = ids(1_100, pair.vocab, 2);
    let catalogue = Catalogue::new(pair.vocab, pair.hidden, 7);
    let table: Vec<u32> = (0..40).rev().collect();
    let mut at = 0;
    for (i, rows) in [500, 1, 30, 550, 1, 3].into_iter().enumerate() {
        let mut batch = Batch::default();
        batch.push(&ids[at..at + rows], at, table.clone());
        let asks: Vec<RowAsk<'_>> = (rows.saturating_sub(4)..rows)
            .map(|row| catalogue.ask(row, at + row, i + row))
            .collect();
        pair.step(&batch, &asks, &format!("rows {at} and on"));
        at += rows;
    }
}

#[test]
fn a_step_is_one_copy_in_each_direction_and_one_wait() {
    let mut pair = tiny(6, 8);
    let catalogue = Catalogue::new(pair.vocab, pair.hidden, 9);
    let ids = ids(20, pair.vocab, 4);
    // Kinds that the card answers by itself, proofs among them.
    let asks: Vec<RowAsk<'_>> =
        (0..7).map(|i| catalogue.ask(10 + i, 10 + i, [0, 1, 2, 3, 4, 5, 16][i])).collect();
    let batch = Batch::of(&ids, 0);
    pair.step(&batch, &asks, "the first time");
    let counted = |counter| count(6, counter);
    let before = [Counter::CopiesToHost, Counter::CopiesToDevice, Counter::Syncs].map(counted);
    let launches = counted(Counter::Launches);
    let results = pair.card.step(&batch, &asks).unwrap();
    assert!(results.iter().all(Result::is_ok));
    let after = [Counter::CopiesToHost, Counter::CopiesToDevice, Counter::Syncs].map(counted);
    assert_eq!([0, 1, 2].map(|i| after[i] - before[i]), [1, 1, 1]);
    // Embedding, ten a layer, final norm, head, two sums, largest, draw, look up, two sketches.
    let launches = counted(Counter::Launches) - launches;
    assert!((20..=40).contains(&launches), "{launches}");
}

#[test]
fn what_differs_is_noticed() {
    let mut pair = tiny(0, 8);
    let ids = ids(40, pair.vocab, 5);
    let right = Catalogue::new(pair.vocab, pair.hidden, 1);
    let other = Catalogue::new(pair.vocab, pair.hidden, 2);
    let asks = |c: &'static Catalogue| -> Vec<RowAsk<'static>> {
        (0..40).map(|row| c.ask(row, row, row)).collect()
    };
    let (right, other): (&'static _, &'static _) =
        (Box::leak(Box::new(right)), Box::leak(Box::new(other)));
    let batch = Batch::of(&ids, 0);
    pair.step(&batch, &asks(right), "as it is");
    // Other keys: draws and proofs.
    let got = pair.card.step(&batch, &asks(other)).unwrap();
    let want = pair.cpu.step(&batch, &asks(right)).unwrap();
    let differ = got.iter().zip(&want).filter(|(g, w)| !is_same(g, w)).count();
    assert!(differ >= 15, "{differ}");
    // One other token changes every row behind it.
    let mut changed = batch.clone();
    changed.ids[20] ^= 1;
    let got = pair.card.step(&changed, &asks(right)).unwrap();
    let is_equal: Vec<bool> = got.iter().zip(&want).map(|(g, w)| is_same(g, w)).collect();
    assert!(is_equal[..20].iter().all(|equal| *equal));
    assert!(is_equal[20..].iter().filter(|equal| **equal).count() < 5, "{is_equal:?}");
    // Another block of the cache: the sequence's past is somebody else's.
    let mut next = Batch::default();
    next.push(&ids[..1], 40, vec![0, 1]);
    let ask = [right.ask(0, 40, 16)];
    pair.card.step(&batch, &[]).unwrap();
    pair.step(&next, &ask, "the right table");
    next.segments[0].blocks = vec![2, 1];
    let [got, _] = [pair.card.step(&next, &ask).unwrap(), Vec::new()];
    next.segments[0].blocks = vec![0, 1];
    assert!(!is_same(&got[0], &pair.cpu.step(&next, &ask).unwrap()[0]));
}

#[test]
fn what_would_read_other_memory_is_refused() {
    let mut pair = tiny(0, 4);
    let mut refused = |batch: &Batch, want: &str| {
        let error = pair.card.step(batch, &[]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    };
    refused(&Batch::of(&[261], 0), "token 261");
    let mut batch = Batch::default();
    batch.push(&[1], 0, vec![4]);
    refused(&batch, "block table");
    batch.segments[0].blocks = vec![];
    refused(&batch, "block table");
    batch.ids.push(1);
    batch.segments[0].blocks = vec![0];
    refused(&batch, "segments must cover");
}
