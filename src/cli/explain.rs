//! Runs `explain`: prints every number behind a miner's weight, down to the round and token that
//! cost it.
//!
//! What is shown is a pure function of records ([`Shown`]): the last weights with their
//! explanation, and what the miner did last.

use super::Failure;
use super::out::outln;
use super::printable::printable;
use super::shared::{DatabaseArg, runtime};
use super::tables::bordered;
use crate::store::record::{
    EpochWeights, MinerResponse, Outcome, RoundResponse, Sampled, Statistics, WeightsState,
};
use crate::store::{Store, StoreError};
use crate::validator::scores::explanation::{ExplainError, Explained};
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Write;

/// Characters of a round's id that are shown in text.
const ID_CHARS: usize = 12;
/// Rounds that are read for causes that the weights do not know: few, since captures come along.
const ROUNDS_READ_MIN: u32 = 100;

/// Arguments of `explain`.
#[derive(Args)]
pub(super) struct ExplainArgs {
    /// The miner's uid on the subnet.
    #[arg(long, env = "TARGON_EXPLAIN_UID")]
    uid: u16,
    /// The number of the subnet.
    #[arg(long, env = "TARGON_NETUID", default_value_t = 4)]
    netuid: u16,
    #[command(flatten)]
    database: DatabaseArg,
    /// How many rounds are shown, the newest first.
    #[arg(
        long,
        env = "TARGON_EXPLAIN_ROUNDS",
        default_value_t = 20,
        value_parser = clap::value_parser!(u32).range(0..=1000)
    )]
    rounds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ExplainArgs) -> Result<(), Failure> {
    let (weights, mut seen) = runtime()?.block_on(read(args)).map_err(|e| {
        let hint = Some("give the --database.url that `validate` writes to");
        Failure::user(e).with_hint(hint)
    })?;
    let mut shown = Shown::new(args.netuid, args.uid, weights, &seen)?;
    seen.truncate(args.rounds as usize);
    shown.rounds = seen;
    if args.json {
        outln!("{}", shown.json());
    } else {
        outln!("{}", shown.text().trim_end());
    }
    Ok(())
}

/// The last weights, and what the miner did last.
async fn read(
    args: &ExplainArgs,
) -> Result<(Option<EpochWeights>, Vec<RoundResponse>), StoreError> {
    let store = Store::open_to_read(&args.database.url).await?;
    let weights = store.last_weights(args.netuid).await?;
    let seen = store.responses(args.netuid, args.uid, args.rounds.max(ROUNDS_READ_MIN)).await?;
    store.close().await;
    Ok((weights, seen))
}

/// What is known of one miner.
pub(super) struct Shown {
    weights: EpochWeights,
    explained: Explained,
    rounds: Vec<RoundResponse>,
}

impl Shown {
    /// The last weights that are remembered for `netuid`, with what is known by now of the miner's
    /// rounds.
    pub(super) fn new(
        netuid: u16,
        uid: u16,
        weights: Option<EpochWeights>,
        seen: &[RoundResponse],
    ) -> Result<Self, Failure> {
        let weights = weights.ok_or_else(|| {
            let hint = Some("they are decided once an epoch while `validate` runs");
            Failure::user(format!("no weights are remembered for subnet {netuid}")).with_hint(hint)
        })?;
        let explained = Explained::new(&weights, uid, seen).map_err(|e| match &e {
            ExplainError::Unreadable { .. } => Failure::ours(&e),
            ExplainError::NoMember { .. } => Failure::user(&e),
        })?;
        Ok(Self { weights, explained, rounds: Vec::new() })
    }

    /// The explanation as JSON.
    pub(super) fn json(&self) -> Value {
        let round = |RoundResponse { round, response }: &RoundResponse| {
            let MinerResponse { timing, outcome, cause, error, sample, statistics, .. } = response;
            json!({
                "round": round.id, "block": round.block, "model": round.model,
                "outcome": outcome, "cause": cause, "error": error, "sample": sample,
                "timing": timing, "statistics": statistics,
            })
        };
        json!({
            "netuid": self.weights.netuid,
            "epoch": self.weights.epoch,
            "block": self.weights.block,
            "state": self.weights.state,
            "profile": self.explained.stored.profile,
            "window": self.explained.stored.window,
            "no_weights": self.explained.stored.none,
            "best_score": self.explained.best_score(),
            "miner": self.explained.miner,
            "rounds": self.rounds.iter().map(round).collect::<Vec<_>>(),
        })
    }

    /// For people: from the weight down to what it is made of.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a text does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Self { weights, explained, .. } = self;
        let Explained { stored, miner } = explained;
        writeln!(
            out,
            "uid {} of subnet {}, {}",
            miner.uid,
            weights.netuid,
            printable(&miner.hotkey)
        )?;
        let (state, block, epoch) = (state(&weights.state), weights.block, weights.epoch);
        writeln!(out, "weights of epoch {epoch}, decided at block {block}: {state}")?;
        let (profile, window) = (stored.profile, stored.window);
        writeln!(out, "scores by {profile}, from the last {window} samples of each model")?;
        if let Some(none) = &stored.none {
            writeln!(out, "nobody has a weight: {}", printable(none))?;
        }
        writeln!(out)?;
        let of = self.explained.best_score();
        writeln!(out, "weight      {:>10}  of 65535", miner.weight)?;
        writeln!(out, "normalised  {:>10.4}  the best score is {of:.4}", miner.normalised)?;
        let gate = if miner.gate.pays { "the gate is open" } else { "the gate is shut: no pay" };
        writeln!(out, "score       {:>10.4}  {gate}", miner.score)?;
        writeln!(out, "sum         {:>10.4}  over all series below", miner.sum)?;
        writeln!(out)?;
        self.write_series(out)?;
        self.write_gate(out)?;
        self.write_misses(out)?;
        self.write_rounds(out)
    }

    fn write_series(&self, out: &mut String) -> std::fmt::Result {
        if self.explained.series().next().is_none() {
            return writeln!(out, "no samples, and no model that counts\n");
        }
        let mut table = bordered(["series", "answers", "misses", "mean", "consistency", "score"]);
        for series in self.explained.series() {
            table.add_row([
                printable(&series.model),
                series.answers.to_string(),
                series.misses.to_string(),
                format!("{:.4}", series.mean),
                format!("{:.4}", series.consistency),
                format!("{:.4}", series.score),
            ]);
        }
        writeln!(out, "{table}")?;
        for series in self.explained.series() {
            let model = printable(&series.model);
            if let Some(why) = &series.left_out {
                writeln!(out, "{model} does not count: {}", printable(why))?;
            }
            if series.of_others > 0 {
                let count = series.of_others;
                writeln!(out, "{model}: {count} samples of an earlier hotkey do not count")?;
            }
            if series.older > 0 {
                writeln!(out, "{model}: {} samples have left the window", series.older)?;
            }
        }
        writeln!(out)
    }

    fn write_gate(&self, out: &mut String) -> std::fmt::Result {
        let gate = &self.explained.miner.gate;
        let sums = gate.sums;
        writeln!(
            out,
            "evidence over {} answers: margin {:.3}, energy {:.3}, joint {:.3}; {:.3} is an alarm",
            gate.answers, sums.margin, sums.energy, sums.joint, gate.alarm_at
        )?;
        if let Some(alarm) = &gate.shut_by {
            writeln!(
                out,
                "the sum of {} raised an alarm in round {} at block {}; it ends when no sum is \
                 above {:.3}",
                printable(&alarm.test),
                printable(&alarm.round),
                alarm.block,
                gate.reopens_at
            )?;
        }
        writeln!(out)
    }

    /// What cost it: misses, newest first.
    fn write_misses(&self, out: &mut String) -> std::fmt::Result {
        let misses = self.explained.misses();
        if misses.is_empty() {
            return writeln!(out, "no misses among the samples that count\n");
        }
        writeln!(out, "misses among the samples that count, newest first:")?;
        for (model, point) in misses {
            let model = printable(model);
            let why = why(point.cause.as_deref(), point.error.as_deref());
            let (block, round) = (point.block, printable(&point.round));
            writeln!(out, "  block {block}, round {round}, {model}: {why}")?;
        }
        writeln!(out)
    }

    fn write_rounds(&self, out: &mut String) -> std::fmt::Result {
        if self.rounds.is_empty() {
            return writeln!(out, "no rounds to show");
        }
        writeln!(out, "last rounds, newest first:")?;
        let mut table = bordered([
            "block", "round", "model", "outcome", "tokens/s", "sample", "measured", "why",
        ]);
        for RoundResponse { round, response } in &self.rounds {
            let why = match response.outcome {
                Outcome::Verified => String::new(),
                _ => why(response.cause.as_deref(), response.error.as_deref()),
            };
            table.add_row([
                round.block.to_string(),
                short(&round.id),
                printable(&round.model),
                response.outcome.name().replace('_', " "),
                format!("{:.2}", response.timing.tps),
                sample(response.sample),
                measured(&response.statistics),
                why,
            ]);
        }
        writeln!(out, "{table}")
    }
}

fn short(round: &str) -> String {
    printable(&round.chars().take(ID_CHARS).collect::<String>())
}

fn why(cause: Option<&str>, error: Option<&str>) -> String {
    match (cause, error) {
        (Some(cause), Some(error)) => format!("{}: {}", printable(cause), printable(error)),
        (Some(text), None) | (None, Some(text)) => printable(text),
        (None, None) => "the cause is not remembered".to_owned(),
    }
}

fn sample(sample: Sampled) -> String {
    match sample {
        Sampled::Tps(tps) => format!("{tps:.2}"),
        Sampled::Miss => "miss".into(),
        Sampled::Nothing => "-".into(),
    }
}

/// What a check measured, with what honest answers are expected to have at most.
fn measured(statistics: &Statistics) -> String {
    let facts = statistics.facts();
    if facts.is_empty() { "-".into() } else { printable(&facts.join("; ")) }
}

fn state(state: &WeightsState) -> String {
    match state {
        WeightsState::Planned => "not sent yet".into(),
        WeightsState::Sent { hash, .. } => {
            format!("sent as {}, not seen on the chain", printable(hash))
        }
        WeightsState::Committed { hash, reveal_round, .. } => {
            format!("committed as {}, revealed at drand round {reveal_round}", printable(hash))
        }
        WeightsState::Confirmed => "on the chain".into(),
        WeightsState::Failed { why } => format!("not on the chain: {}", printable(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entropy::Entropy;
    use crate::store::WeightsClaim;
    use crate::store::record::{LikelyCheat, MeasuredValue, Round, RoundHead, Sample, Timing};
    use crate::validator::scores::emission::ChainLimits;
    use crate::validator::scores::gate::{Alarm, HotkeyState};
    use crate::validator::scores::rules::{ScoringProfile, ScoringRules};
    use crate::validator::scores::{Input, Seat, decide};
    use crate::verify::evidence::{ALARM, Evidence, Sums};
    use std::collections::BTreeMap;

    const MODEL: &str = "a/model";

    fn seen(
        block: u64,
        outcome: Outcome,
        sample: Sampled,
        why: Option<(&str, &str)>,
    ) -> RoundResponse {
        let tps = if let Sampled::Tps(tps) = sample { tps } else { 0.0 };
        let response = MinerResponse {
            uid: 1,
            hotkey: "key-1".into(),
            coldkey: "cold".into(),
            timing: Timing { tps, ..Timing::default() },
            outcome,
            cause: why.map(|(cause, _)| cause.into()),
            error: why.map(|(_, error)| error.into()),
            sample,
            capture: None,
            report: None,
            statistics: Default::default(),
        };
        let round = RoundHead {
            id: format!("{block:032}"),
            netuid: 4,
            block,
            started_ms: block,
            ended_ms: block,
            model: MODEL.into(),
            endpoint: "/v1/completions".into(),
            profile: "default".into(),
            asked: 3,
            verified: 1,
        };
        RoundResponse { round, response }
    }

    /// Weights over three miners: a fast one, one with a miss, one behind an alarm.
    fn weights() -> EpochWeights {
        let mut seats = BTreeMap::new();
        for uid in 0..3 {
            let models = vec![MODEL.to_owned()];
            let seat = Seat { hotkey: format!("key-{uid}"), models, ..Seat::default() };
            seats.insert(uid, seat);
        }
        let sums = Sums { margin: ALARM, energy: 1.5, joint: ALARM };
        let alarm = Alarm { round: "f".repeat(32), block: 77, test: "margin".into(), sums };
        let evidence = Evidence { answers: 40, alarms: 1, sums };
        if let Some(seat) = seats.get_mut(&2) {
            seat.state = HotkeyState { evidence, shut_by: Some(alarm) };
        }
        let sample = |uid: u16, block: u64, tps| Sample {
            round: format!("{block:032}"),
            uid,
            hotkey: format!("key-{uid}"),
            model: MODEL.into(),
            block,
            tps,
        };
        let samples = [
            sample(0, 10, Some(80.0)),
            sample(1, 10, Some(60.0)),
            sample(1, 11, None),
            sample(2, 10, Some(60.0)),
        ];
        let models = [MODEL.to_owned()];
        let limits = ChainLimits::NONE;
        let input =
            Input { seats: &seats, models: &models, samples: &samples, findings: &[], limits };
        let decision = decide(&ScoringRules::of(ScoringProfile::Default), &input);
        EpochWeights {
            netuid: 4,
            epoch: 5,
            block: 12,
            values: decision.values.clone(),
            explanation: decision.explanation().unwrap(),
            state: WeightsState::Confirmed,
        }
    }

    #[test]
    fn a_weight_is_followed_down_to_the_token() {
        let rounds = vec![
            seen(13, Outcome::Unscored, Sampled::Nothing, Some(("ENGINE", "no memory\nleft"))),
            seen(11, Outcome::Rejected, Sampled::Miss, Some(("UNLIKELY_TOKEN", "token 17\u{1b}"))),
            seen(10, Outcome::Verified, Sampled::Tps(60.0), None),
        ];
        let mut shown = Shown::new(4, 1, Some(weights()), &rounds).map_err(|e| e.message).unwrap();
        shown.rounds = rounds;
        shown.rounds[2].response.statistics = Statistics {
            rows: Some(96),
            margin: Some(0.001),
            trimmed: Some(MeasuredValue { value: 91.5, limit: 225.0 }),
            twin: Some(MeasuredValue { value: 1.75, limit: 1.4 }),
            likeliest: Some(LikelyCheat { name: "int8\u{1b}".into(), beta: 0.97 }),
        };
        let text = shown.text();
        for part in [
            "uid 1 of subnet 4, key-1\n",
            "weights of epoch 5, decided at block 12: on the chain\n",
            "scores by default, from the last 30 samples of each model\n",
            "weight           12371  of 65535\n",
            "the best score is 79.4646\n",
            "score          15.0000  the gate is open\n",
            "│ a/model ┆ 1       ┆ 1      ┆ 30.0000 ┆ 0.5000      ┆ 15.0000 │",
            "  block 11, round 00000000000000000000000000000011, a/model: UNLIKELY_TOKEN: \
             token 17\\u001b\n",
            "ENGINE: no memory\\nleft",
            "evidence over 0 answers",
            "96 rows; margin 0.0010; energy 91.50 of 225.00; twin 1.75 of 1.40; int8\\u001b, beta \
             0.97",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let json = shown.json();
        assert_eq!(json["miner"]["weight"], 12_371);
        assert_eq!(json["miner"]["models"][0]["points"][1]["error"], "token 17\u{1b}");
        assert_eq!(json["rounds"][0]["outcome"], "unscored");
        assert_eq!(json["rounds"][2]["statistics"]["twin"]["limit"], 1.4);
        assert_eq!(json["rounds"][0]["statistics"]["rows"], Value::Null);
        assert_eq!((&json["state"]["state"], &json["epoch"]), (&json!("confirmed"), &json!(5)));
    }

    #[test]
    fn a_shut_gate_names_its_alarm_and_its_end() {
        let shown = Shown::new(4, 2, Some(weights()), &[]).map_err(|e| e.message).unwrap();
        let text = shown.text();
        for part in [
            "weight               0  of 65535\n",
            "score           0.0000  the gate is shut: no pay\n",
            "sum            59.5984  over all series below\n",
            "evidence over 40 answers: margin 13.816, energy 1.500, joint 13.816; 13.816 is \
             an alarm\n",
            "the sum of margin raised an alarm in round ffffffffffffffffffffffffffffffff at block \
             77; it ends when no sum is above 6.908\n",
            "no misses among the samples that count\n",
            "no rounds to show\n",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[tokio::test]
    async fn records_are_read_beside_the_validator_that_writes_them() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("validator.sqlite").display().to_string();
        let database = DatabaseArg { url: database };
        let args = ExplainArgs { uid: 1, netuid: 4, database, rounds: 20, json: false };
        assert!(read(&args).await.is_err(), "there are no records yet");
        let store = Store::open(&args.database.url, &Entropy::seeded(1)).await.unwrap();
        let why = Some(("UNLIKELY_TOKEN", "token 17 has rank 90"));
        let RoundResponse { round, response } = seen(11, Outcome::Rejected, Sampled::Miss, why);
        let round = Round {
            id: round.id,
            netuid: 4,
            block: 11,
            started_ms: 1,
            ended_ms: 2,
            model: MODEL.into(),
            endpoint: round.endpoint,
            request: json!({"model": MODEL}),
            profile: round.profile,
            responses: vec![response],
        };
        store.save_round(&round).await.unwrap();
        let planned = EpochWeights { state: WeightsState::Planned, ..weights() };
        assert_eq!(store.plan_weights(&planned).await.unwrap(), WeightsClaim::Ours);
        let (weights, seen) = read(&args).await.unwrap();
        assert_eq!((weights.as_ref(), seen.len()), (Some(&planned), 1));
        let shown = Shown::new(4, 1, weights, &seen).map_err(|e| e.message).unwrap();
        let text = shown.text();
        assert!(text.contains("a/model: UNLIKELY_TOKEN: token 17 has rank 90\n"), "{text}");
        assert!(text.contains("decided at block 12: not sent yet\n"), "{text}");
        store.close().await;
    }

    #[test]
    fn what_is_not_there_is_said() {
        let fails = |uid, weights| match Shown::new(4, uid, weights, &[]) {
            Ok(_) => panic!("nothing can be shown"),
            Err(failure) => (failure.message, failure.is_ours),
        };
        let none = ("no weights are remembered for subnet 4".to_owned(), false);
        assert_eq!(fails(1, None), none);
        let (message, _) = fails(9, Some(weights()));
        assert_eq!(
            message,
            "uid 9 was not on the subnet when weights were decided at block 12: uids lie between 0 \
             and 2"
        );
        let odd = EpochWeights { explanation: json!({"profile": "x"}), ..weights() };
        assert!(fails(1, Some(odd)).1);
    }
}
