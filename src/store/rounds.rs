//! Stores and reads rounds and what each miner did in them.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::hotkeys;
use super::record::{
    LikelyCheat, MeasuredValue, MinerResponse, Outcome, Round, RoundHead, RoundResponse, Sampled,
    Statistics, Timing,
};
use super::rows::{
    finite, get, get_json, get_json_or_none, get_number, get_number_or_none, json, number,
    placeholders,
};
use super::session::{Bound, Session};
use sqlx::any::AnyRow;
use std::collections::BTreeMap;

/// Responses that one statement writes.
const ROWS_MAX: usize = 64;
/// What a query returns at most, whatever it was asked for.
const HEADS_MAX: u32 = 10_000;
const ANSWERED_MAX: u32 = 1_000;

const ROUND: &str = "INSERT INTO rounds
        (id, netuid, block, started_ms, ended_ms, model, endpoint, profile, request)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (id) DO NOTHING";
const RESPONSE: [&str; 26] = [
    "round",
    "netuid",
    "started_ms",
    "uid",
    "hotkey",
    "coldkey",
    "first_token",
    "all_tokens",
    "total",
    "tps",
    "tokens",
    "outcome",
    "cause",
    "error",
    "sample",
    "sample_tps",
    "report",
    "capture",
    "rows_scored",
    "margin",
    "trimmed",
    "trimmed_limit",
    "twin",
    "twin_limit",
    "likeliest",
    "beta",
];
const SAMPLE: [&str; 8] = ["round", "netuid", "uid", "hotkey", "model", "block", "at_ms", "tps"];
/// Columns of a [`RoundHead`].
const HEAD: &str =
    "r.id, r.netuid, r.block, r.started_ms, r.ended_ms, r.model, r.endpoint, r.profile,
    (SELECT COUNT(*) FROM responses a WHERE a.round = r.id) AS asked,
    (SELECT COUNT(*) FROM responses a WHERE a.round = r.id AND a.outcome = 'verified') AS verified";

impl Store {
    /// Keeps a round with its responses, and adds its samples: all of it or nothing. A round that
    /// is kept already changes nothing.
    ///
    /// # Errors
    /// When it cannot be kept: the field that cannot, or the database's words.
    pub async fn save_round(&self, round: &Round) -> Result<(), StoreError> {
        let operation = format!("save round {}", round.id);
        let written = Written::of(round).map_err(|cause| self.error(&operation, cause))?;
        let mut session = self.write(&operation).await?;
        if session.execute(ROUND, written.round).await? == 0 {
            check_same(&mut session, round).await?;
            return session.commit().await;
        }
        insert(&mut session, "responses", &RESPONSE, written.responses).await?;
        insert(&mut session, "samples", &SAMPLE, written.samples).await?;
        hotkeys::note(&mut session, round.netuid, round.block, &written.hotkeys).await?;
        session.commit().await
    }

    /// A whole round, its responses in the order of uids.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn round(&self, id: &str) -> Result<Option<Round>, StoreError> {
        let mut session = self.read(&format!("read round {id}")).await?;
        let head = "SELECT * FROM rounds WHERE id = $1";
        let heads = session.rows(head, vec![id.into()]).await?;
        let all = "SELECT * FROM responses WHERE round = $1 ORDER BY uid";
        let responses = session.rows(all, vec![id.into()]).await?;
        let round = heads.first().map(|head| whole(head, &responses)).transpose();
        let round = round.map_err(|cause| session.error(cause))?;
        session.commit().await?;
        Ok(round)
    }

    /// The newest rounds of a subnet that began before `before_ms`, newest first; at most 10,000.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn rounds(
        &self,
        netuid: u16,
        before_ms: u64,
        limit: u32,
    ) -> Result<Vec<RoundHead>, StoreError> {
        let session = self.read(&format!("read the rounds of netuid {netuid}")).await?;
        let sql = format!(
            "SELECT {HEAD} FROM rounds r WHERE r.netuid = $1 AND r.started_ms < $2
             ORDER BY r.started_ms DESC, r.id DESC LIMIT $3"
        );
        let before = i64::try_from(before_ms).unwrap_or(i64::MAX);
        let values = vec![netuid.into(), before.into(), limit.min(HEADS_MAX).into()];
        session.read(&sql, values, head).await
    }

    /// What the miner at `uid` did last, newest first; at most 1,000.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn responses(
        &self,
        netuid: u16,
        uid: u16,
        limit: u32,
    ) -> Result<Vec<RoundResponse>, StoreError> {
        let session = self.read(&format!("read the responses of uid {uid}")).await?;
        let columns = RESPONSE.map(|column| format!("p.{column}")).join(", ");
        // The round's id, netuid and time stand in both.
        let sql = format!(
            "SELECT {HEAD}, {columns} FROM responses p JOIN rounds r ON r.id = p.round
             WHERE p.netuid = $1 AND p.uid = $2
             ORDER BY p.started_ms DESC, p.round DESC LIMIT $3"
        );
        let values = vec![netuid.into(), uid.into(), limit.min(ANSWERED_MAX).into()];
        let read = |row: &AnyRow| Ok(RoundResponse { round: head(row)?, response: response(row)? });
        session.read(&sql, values, read).await
    }
}

/// A round as values of statements: what can be wrong with it is found before anything is written.
struct Written<'a> {
    round: Vec<Bound<'a>>,
    responses: Vec<Vec<Bound<'a>>>,
    samples: Vec<Vec<Bound<'a>>>,
    hotkeys: BTreeMap<u16, &'a str>,
}

impl<'a> Written<'a> {
    fn of(round: &'a Round) -> Result<Self, Cause> {
        check_id(&round.id)?;
        let head = vec![
            round.id.as_str().into(),
            round.netuid.into(),
            number("block", round.block)?.into(),
            number("started_ms", round.started_ms)?.into(),
            number("ended_ms", round.ended_ms)?.into(),
            round.model.as_str().into(),
            round.endpoint.as_str().into(),
            round.profile.as_str().into(),
            json("request", &round.request)?.into(),
        ];
        let mut written =
            Self { round: head, responses: vec![], samples: vec![], hotkeys: BTreeMap::new() };
        for response in &round.responses {
            let uid = response.uid;
            let place = |cause| match cause {
                Cause::Record(words) => Cause::Record(format!("uid {uid}: {words}")),
                other => other,
            };
            if written.hotkeys.insert(uid, &response.hotkey).is_some() {
                return Err(Cause::Record(format!("uid {uid} must be in a round only once")));
            }
            written.responses.push(response_values(round, response).map_err(place)?);
            written.samples.extend(sample_values(round, response).map_err(place)?);
        }
        Ok(written)
    }
}

fn check_id(id: &str) -> Result<(), Cause> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    match id.len() == 32 && id.bytes().all(is_hex) {
        true => Ok(()),
        false => {
            let words = format!("`id` must have 32 lowercase hexadecimal digits, got {id:?}");
            Err(Cause::Record(words))
        }
    }
}

fn response_values<'a>(
    round: &'a Round,
    response: &'a MinerResponse,
) -> Result<Vec<Bound<'a>>, Cause> {
    let (sample, sample_tps) = match response.sample {
        Sampled::Tps(tps) => ("tps", finite("sample", tps)?),
        Sampled::Miss => ("miss", Bound::Real(None)),
        Sampled::Nothing => ("nothing", Bound::Real(None)),
    };
    let text = |field, value: &Option<_>| -> Result<Bound<'a>, Cause> {
        Ok(Bound::Text(value.as_ref().map(|v| json(field, v)).transpose()?.map(Into::into)))
    };
    let Timing { first_token, all_tokens, total, tps, tokens } = response.timing;
    let mut values = vec![
        round.id.as_str().into(),
        round.netuid.into(),
        number("started_ms", round.started_ms)?.into(),
        response.uid.into(),
        response.hotkey.as_str().into(),
        response.coldkey.as_str().into(),
        finite("first_token", first_token)?,
        finite("all_tokens", all_tokens)?,
        finite("total", total)?,
        finite("tps", tps)?,
        tokens.into(),
        response.outcome.name().into(),
        response.cause.as_deref().into(),
        response.error.as_deref().into(),
        sample.into(),
        sample_tps,
        text("report", &response.report)?,
        text("capture", &response.capture)?,
    ];
    values.extend(statistics_values(&response.statistics)?);
    Ok(values)
}

fn statistics_values(statistics: &Statistics) -> Result<[Bound<'_>; 8], Cause> {
    let real = |field, value: Option<f64>| match value {
        Some(value) => finite(field, value),
        None => Ok(Bound::Real(None)),
    };
    let Statistics { rows, margin, trimmed, twin, likeliest } = statistics;
    Ok([
        Bound::Integer(rows.map(i64::from)),
        real("margin", *margin)?,
        real("trimmed", trimmed.map(|m| m.value))?,
        real("trimmed_limit", trimmed.map(|m| m.limit))?,
        real("twin", twin.map(|m| m.value))?,
        real("twin_limit", twin.map(|m| m.limit))?,
        likeliest.as_ref().map(|cheat| cheat.name.as_str()).into(),
        real("beta", likeliest.as_ref().map(|cheat| cheat.beta))?,
    ])
}

fn sample_values<'a>(
    round: &'a Round,
    response: &'a MinerResponse,
) -> Result<Option<Vec<Bound<'a>>>, Cause> {
    let tps = match response.sample {
        Sampled::Tps(tps) => finite("sample", tps)?,
        Sampled::Miss => Bound::Real(None),
        Sampled::Nothing => return Ok(None),
    };
    Ok(Some(vec![
        round.id.as_str().into(),
        round.netuid.into(),
        response.uid.into(),
        response.hotkey.as_str().into(),
        round.model.as_str().into(),
        number("block", round.block)?.into(),
        number("ended_ms", round.ended_ms)?.into(),
        tps,
    ]))
}

/// Writes rows, as many in a statement as is sensible: a distant server is asked a few times only.
async fn insert(
    session: &mut Session,
    table: &str,
    columns: &[&str],
    rows: Vec<Vec<Bound<'_>>>,
) -> Result<(), StoreError> {
    let names = columns.join(", ");
    let mut rows = rows.into_iter();
    loop {
        let some: Vec<_> = rows.by_ref().take(ROWS_MAX).collect();
        if some.is_empty() {
            return Ok(());
        }
        let places = placeholders(some.len(), columns.len());
        let sql = format!("INSERT INTO {table} ({names}) VALUES {places}");
        session.execute(&sql, some.into_iter().flatten().collect()).await?;
    }
}

/// Two rounds of one id would be a fault of ours; the second one must not vanish without a word.
async fn check_same(session: &mut Session, round: &Round) -> Result<(), StoreError> {
    let sql = "SELECT COUNT(*) FROM rounds
        WHERE id = $1 AND netuid = $2 AND block = $3 AND started_ms = $4 AND model = $5";
    let (block, started) = {
        // Gone before anything is waited for: a future that holds it cannot change its thread.
        let number = |field, value| number(field, value).map_err(|cause| session.error(cause));
        (number("block", round.block)?, number("started_ms", round.started_ms)?)
    };
    let values = vec![
        round.id.as_str().into(),
        round.netuid.into(),
        block.into(),
        started.into(),
        round.model.as_str().into(),
    ];
    match session.integer(sql, values).await? {
        Some(1) => Ok(()),
        _ => Err(session.error(Cause::Record("another round has this `id`".into()))),
    }
}

fn whole(row: &AnyRow, responses: &[AnyRow]) -> Result<Round, Cause> {
    Ok(Round {
        id: get(row, "id")?,
        netuid: get_number(row, "netuid")?,
        block: get_number(row, "block")?,
        started_ms: get_number(row, "started_ms")?,
        ended_ms: get_number(row, "ended_ms")?,
        model: get(row, "model")?,
        endpoint: get(row, "endpoint")?,
        request: get_json(row, "request")?,
        profile: get(row, "profile")?,
        responses: responses.iter().map(response).collect::<Result<_, _>>()?,
    })
}

fn head(row: &AnyRow) -> Result<RoundHead, Cause> {
    Ok(RoundHead {
        id: get(row, "id")?,
        netuid: get_number(row, "netuid")?,
        block: get_number(row, "block")?,
        started_ms: get_number(row, "started_ms")?,
        ended_ms: get_number(row, "ended_ms")?,
        model: get(row, "model")?,
        endpoint: get(row, "endpoint")?,
        profile: get(row, "profile")?,
        asked: get_number(row, "asked")?,
        verified: get_number(row, "verified")?,
    })
}

/// When what of a response arrived.
pub(super) fn timing(row: &AnyRow) -> Result<Timing, Cause> {
    Ok(Timing {
        first_token: get(row, "first_token")?,
        all_tokens: get(row, "all_tokens")?,
        total: get(row, "total")?,
        tps: get(row, "tps")?,
        tokens: get_number(row, "tokens")?,
    })
}

/// What became of a response.
pub(super) fn outcome(row: &AnyRow) -> Result<Outcome, Cause> {
    let name: String = get(row, "outcome")?;
    Outcome::named(&name).ok_or_else(|| Cause::Stored(format!("column `outcome`: {name:?}")))
}

pub(super) fn response(row: &AnyRow) -> Result<MinerResponse, Cause> {
    let unknown = |column, name: &str| Cause::Stored(format!("column `{column}`: {name:?}"));
    let sample: String = get(row, "sample")?;
    Ok(MinerResponse {
        uid: get_number(row, "uid")?,
        hotkey: get(row, "hotkey")?,
        coldkey: get(row, "coldkey")?,
        timing: timing(row)?,
        outcome: outcome(row)?,
        cause: get(row, "cause")?,
        error: get(row, "error")?,
        sample: match sample.as_str() {
            "tps" => Sampled::Tps(get(row, "sample_tps")?),
            "miss" => Sampled::Miss,
            "nothing" => Sampled::Nothing,
            other => return Err(unknown("sample", other)),
        },
        capture: get_json_or_none(row, "capture")?,
        report: get_json_or_none(row, "report")?,
        statistics: statistics(row)?,
    })
}

fn statistics(row: &AnyRow) -> Result<Statistics, Cause> {
    let measured = |value, limit| -> Result<_, Cause> {
        let pair = get::<Option<f64>>(row, value)?.zip(get(row, limit)?);
        Ok(pair.map(|(value, limit)| MeasuredValue { value, limit }))
    };
    let likeliest = get::<Option<String>>(row, "likeliest")?.zip(get(row, "beta")?);
    Ok(Statistics {
        rows: get_number_or_none(row, "rows_scored")?,
        margin: get(row, "margin")?,
        trimmed: measured("trimmed", "trimmed_limit")?,
        twin: measured("twin", "twin_limit")?,
        likeliest: likeliest.map(|(name, beta)| LikelyCheat { name, beta }),
    })
}
