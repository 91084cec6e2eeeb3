//! Lists the attacks: what each does, which check should detect it, and what is required.

use super::results::Detector;
use super::tamper::Tamper;
use crate::bench::stats::choice;
use crate::models::sampler::Sampling;
use crate::proof::Scheme;
use crate::proof::commit::ChunkProof;

/// A line of the table: how answers are made, and what must catch them.
pub(super) struct Attack {
    /// Its name in tables.
    pub(super) name: &'static str,
    /// What a cheat does.
    pub(super) cheat: Cheat,
    /// What should show it.
    pub(super) detector: Detector,
    /// What is demanded.
    pub(super) goal: Option<Goal>,
}

/// How an answer is made.
#[derive(Clone, Copy)]
pub(super) enum Cheat {
    /// Tokens and rows of changed weights.
    Weights(Tamper),
    /// Tokens of changed weights, then true rows over them.
    Spoof(Tamper),
    /// Tokens that a draft with changed weights proposed and a lax rule kept; true rows.
    Draft(Tamper),
    /// Tokens and rows over keys and values of eight bits.
    Int8Cache,
    /// Tokens and rows after a changed prompt.
    Prompt(fn(&[u32]) -> Vec<u32>),
    /// Tokens drawn otherwise than asked, true rows.
    Sampler(fn(&mut Sampling)),
    /// Ended early, with an end token that was not drawn.
    Cut,
    /// Ended early, as if an end token had been drawn and not sent.
    CutSilently,
    /// The end token dropped, and others drawn in its place.
    EndSkipped,
    /// One token in 32 exchanged under the proof of the honest answer.
    Exchanged,
    /// The same, then true rows over the result.
    ExchangedAndProved,
    /// An old answer with its old proof.
    Replayed,
    /// The same, under the root that is asked for.
    ReplayedAndBound,
    /// Another miner's proof of the same answer.
    Copied,
    /// The same, under one's own root and signature.
    CopiedAndBound,
    /// The chunks of the answer to another question.
    Stolen,
    /// Chunks that were not computed.
    Forged(fn(&mut [ChunkProof])),
    /// What no prover would send.
    Malformed,
}

/// What is demanded of the verifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Goal {
    /// Every answer is rejected by its first so many chunks.
    Chunks(usize),
    /// So many tokens are enough in 95 % of all orders of answers.
    Tokens(usize),
    /// Every answer is rejected.
    Always,
    /// None is: a control, made by the same means as cheats.
    Never,
}

impl Attack {
    /// The schemes that are set side by side.
    pub(super) fn schemes(&self) -> &'static [Scheme] {
        match self.detector {
            Detector::Energy => &Scheme::ALL,
            _ => &[Scheme::Residue, Scheme::Toploc],
        }
    }

    /// Whether the tokens are other than honest ones, so that rules about tokens have a say.
    pub(super) fn changes_tokens(&self) -> bool {
        !matches!(
            self.cheat,
            Cheat::Copied
                | Cheat::CopiedAndBound
                | Cheat::Stolen
                | Cheat::Forged(_)
                | Cheat::Malformed
        )
    }

    /// Whether evidence grows token by token.
    pub(super) fn adds_up(&self) -> bool {
        matches!(
            self.cheat,
            Cheat::Spoof(_) | Cheat::Draft(_) | Cheat::Sampler(_) | Cheat::ExchangedAndProved
        )
    }
}

/// All of them, for a model of so many layers. Attacks that share changed weights stand together.
pub(super) fn all(layers: usize) -> Vec<Attack> {
    let mut all = weights(layers);
    all.extend(rows());
    all.extend(tokens());
    all.extend(bindings());
    all
}

fn attack(name: &'static str, cheat: Cheat, detector: Detector, goal: Option<Goal>) -> Attack {
    Attack { name, cheat, detector, goal }
}

fn weights(layers: usize) -> Vec<Attack> {
    let integers = |bits, group| Tamper::Integers { bits, group };
    let (g32, channel, fine) = (integers(4, 32), integers(8, 0), integers(8, 32));
    let own = |name, tamper, chunks: Option<usize>| {
        attack(name, Cheat::Weights(tamper), Detector::Energy, chunks.map(Goal::Chunks))
    };
    let spoof = |name, tamper, tokens: Option<usize>| {
        attack(name, Cheat::Spoof(tamper), Detector::Margin, tokens.map(Goal::Tokens))
    };
    vec![
        own("int4 g32", g32, Some(1)),
        spoof("spoofed from int4 g32", g32, Some(64)),
        attack("speculation, int4 draft, lossy", Cheat::Draft(g32), Detector::Margin, None),
        own("int4 g64", integers(4, 64), Some(1)),
        own("int4 per channel", integers(4, 0), Some(1)),
        own("int8 per channel", channel, Some(1)),
        spoof("spoofed from int8 per channel", channel, None),
        own("int8 g32", fine, Some(2)),
        spoof("spoofed from int8 g32", fine, None),
        own("fp8 e4m3", Tamper::Fp8, Some(1)),
        own("int4 last 3 layers", Tamper::LastLayers { layers: 3, bits: 4 }, None),
        own("one layer skipped", Tamper::SkippedLayer(layers / 2), None),
        own("rank-4 update of 1 %", Tamper::LowRank(0.01), None),
        own("rank-4 update of 0.1 %", Tamper::LowRank(0.001), None),
    ]
}

fn rows() -> Vec<Attack> {
    let energy = |name, cheat| attack(name, cheat, Detector::Energy, None);
    vec![
        attack(
            "control: lockstep, nothing changed",
            Cheat::Prompt(<[u32]>::to_vec),
            Detector::Nothing,
            Some(Goal::Never),
        ),
        attack("int8 KV cache", Cheat::Int8Cache, Detector::Energy, Some(Goal::Chunks(2))),
        energy("one prompt token changed", Cheat::Prompt(change_a_token)),
        energy("prompt without its first 8 tokens", Cheat::Prompt(drop_the_start)),
        energy("1 token in 32 exchanged", Cheat::Exchanged),
    ]
}

fn tokens() -> Vec<Attack> {
    type Change = fn(&mut Sampling);
    let sampler = |name, change: Change, tokens: Option<usize>| {
        attack(name, Cheat::Sampler(change), Detector::Margin, tokens.map(Goal::Tokens))
    };
    let other = |name, cheat| attack(name, cheat, Detector::Margin, None);
    vec![
        sampler("temperature 0.7 for 0.8", |s| s.temperature = 0.7, Some(400)),
        sampler("temperature 0.9 for 0.8", |s| s.temperature = 0.9, Some(400)),
        sampler("top-p 0.95", |s| s.top_p = 0.95, None),
        sampler("greedy", |s| s.temperature = 0.0, None),
        sampler("another seed", |s| s.noise_key ^= 1, Some(16)),
        other("1 in 32 exchanged, proved anew", Cheat::ExchangedAndProved),
        other("early stop with an end token", Cheat::Cut),
        attack("early stop without one", Cheat::CutSilently, Detector::Binding, None),
        other("end token skipped", Cheat::EndSkipped),
    ]
}

fn bindings() -> Vec<Attack> {
    let always = |name, cheat| attack(name, cheat, Detector::Binding, Some(Goal::Always));
    let forged = |name, forge: fn(&mut [ChunkProof])| always(name, Cheat::Forged(forge));
    vec![
        always("replay", Cheat::Replayed),
        always("replay under the new root", Cheat::ReplayedAndBound),
        always("another miner's proof", Cheat::Copied),
        always("another miner's proof, signed anew", Cheat::CopiedAndBound),
        always("proof of another answer", Cheat::Stolen),
        forged("null proof", |chunks| chunks.iter_mut().for_each(|c| c.data.clear())),
        forged("proof of zeros", |chunks| chunks.iter_mut().for_each(|c| c.data.fill(0))),
        forged("constant proof", |chunks| chunks.iter_mut().for_each(|c| c.data.fill(0x5a))),
        forged("random proof", randomise),
        forged("proof shifted by a row", |chunks| {
            chunks.iter_mut().for_each(|c| c.data.rotate_left(4));
        }),
        forged("chunks exchanged", exchange_chunks),
        always("malformed bytes", Cheat::Malformed),
    ]
}

/// A token of the question becomes the one before it.
fn change_a_token(prompt: &[u32]) -> Vec<u32> {
    let mut changed = prompt.to_vec();
    let place = prompt.len() * 3 / 4;
    let (before, own) = (prompt[place.saturating_sub(1)], prompt[place]);
    changed[place] = if before == own { u32::from(own == 0) } else { before };
    changed
}

fn drop_the_start(prompt: &[u32]) -> Vec<u32> {
    prompt[8.min(prompt.len() - 1)..].to_vec()
}

fn randomise(chunks: &mut [ChunkProof]) {
    for chunk in chunks {
        let seed = u64::from(chunk.index) + 1;
        for (place, byte) in (0_u32..).zip(&mut chunk.data) {
            *byte = choice(seed, place, 256) as u8;
        }
    }
}

fn exchange_chunks(chunks: &mut [ChunkProof]) {
    for pair in chunks.chunks_exact_mut(2) {
        let (even, odd) = pair.split_at_mut(1);
        std::mem::swap(&mut even[0].data, &mut odd[0].data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_distinct_and_every_goal_is_there() {
        let all = all(30);
        assert_eq!(all.iter().map(|a| a.name).collect::<BTreeSet<_>>().len(), all.len());
        let chunks = all.iter().filter(|a| matches!(a.goal, Some(Goal::Chunks(_)))).count();
        let tokens = all.iter().filter(|a| matches!(a.goal, Some(Goal::Tokens(_)))).count();
        assert_eq!((chunks, tokens), (7, 4));
    }

    #[test]
    fn forgeries_change_what_they_should() {
        let chunk = |index: u32| ChunkProof { index, data: vec![index as u8; 8], digest: [0; 32] };
        let mut chunks: Vec<ChunkProof> = (0..3).map(chunk).collect();
        exchange_chunks(&mut chunks);
        let firsts: Vec<u8> = chunks.iter().map(|c| c.data[0]).collect();
        assert_eq!(firsts, [1, 0, 2]);
        randomise(&mut chunks);
        assert!(chunks[0].data != chunks[1].data && chunks[0].data.len() == 8);
        let prompt: Vec<u32> = (0..40).collect();
        let changed = change_a_token(&prompt);
        assert_eq!(prompt.iter().zip(&changed).filter(|(a, b)| a != b).count(), 1);
        assert_eq!(change_a_token(&[5; 4]), [5, 5, 5, 0]);
        assert_eq!(drop_the_start(&prompt), prompt[8..]);
    }
}
