//! Reads all rows of a table, page after page, for use of the data elsewhere. A page is a
//! transaction of its own: a slow reader delays neither the validator nor the database's
//! maintenance.

use super::database::Store;
use super::error::{Cause, StoreError};
use super::rows::get;
use super::session::Bound;
use sqlx::any::AnyRow;

/// What can be exported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Rounds without their responses.
    Rounds,
    /// What each miner did in each round.
    Responses,
    /// What scores are made of.
    Samples,
    /// Weights of each epoch.
    Weights,
}

/// Which rows of a table are read.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Those of this time or later, in milliseconds since 1970: a round's start, a sample's end of
    /// round, when weights were planned.
    pub since_ms: u64,
    /// Those of the miner at this place; of rounds, those in which it was asked. Weights are of
    /// all.
    pub uid: Option<u16>,
}

/// What stands in one column of one row.
#[derive(Clone, PartialEq, Debug)]
pub enum Cell {
    /// Nothing.
    Null,
    /// A number without a fraction.
    Integer(i64),
    /// A number.
    Real(f64),
    /// Text, which may come from a peer.
    Text(String),
    /// JSON, as it was written.
    Json(String),
}

#[derive(Clone, Copy)]
enum Kind {
    Integer,
    Real,
    Text,
    Json,
}

use Kind::{Integer, Json, Real, Text};

/// Where rows come from.
struct Source {
    /// Name in the export, expression, and what it holds.
    columns: &'static [(&'static str, &'static str, Kind)],
    tables: &'static str,
    /// Keeps the rows of one uid, `$U`; none where rows have no uid.
    of_uid: Option<&'static str>,
    /// Places of the columns by which rows are ordered, the time first; together they are unique.
    order: &'static [usize],
    /// Where the first page starts: less than any row of the same time.
    first: &'static [Bound<'static>],
    /// Rows of a page.
    page: u32,
}

const BEFORE_ALL: Bound<'static> = Bound::Integer(Some(-1));
const BEFORE_TEXT: Bound<'static> = Bound::Text(Some(std::borrow::Cow::Borrowed("")));

static ROUNDS: Source = Source {
    columns: &[
        ("round", "r.id", Text),
        ("netuid", "r.netuid", Integer),
        ("block", "r.block", Integer),
        ("started_ms", "r.started_ms", Integer),
        ("ended_ms", "r.ended_ms", Integer),
        ("model", "r.model", Text),
        ("endpoint", "r.endpoint", Text),
        ("profile", "r.profile", Text),
        ("request", "r.request", Json),
    ],
    tables: "rounds r",
    of_uid: Some("EXISTS (SELECT 1 FROM responses p WHERE p.round = r.id AND p.uid = $U)"),
    order: &[3, 0],
    first: &[BEFORE_TEXT],
    page: 500,
};

static RESPONSES: Source = Source {
    columns: &[
        ("round", "p.round", Text),
        ("netuid", "p.netuid", Integer),
        ("block", "r.block", Integer),
        ("started_ms", "p.started_ms", Integer),
        ("model", "r.model", Text),
        ("uid", "p.uid", Integer),
        ("hotkey", "p.hotkey", Text),
        ("coldkey", "p.coldkey", Text),
        ("time_to_first_token", "p.first_token", Real),
        ("time_for_all_tokens", "p.all_tokens", Real),
        ("total_time", "p.total", Real),
        ("tps", "p.tps", Real),
        ("tokens", "p.tokens", Integer),
        ("outcome", "p.outcome", Text),
        ("cause", "p.cause", Text),
        ("error", "p.error", Text),
        ("sample", "p.sample", Text),
        ("sample_tps", "p.sample_tps", Real),
        ("rows_scored", "p.rows_scored", Integer),
        ("margin", "p.margin", Real),
        ("trimmed", "p.trimmed", Real),
        ("trimmed_limit", "p.trimmed_limit", Real),
        ("twin", "p.twin", Real),
        ("twin_limit", "p.twin_limit", Real),
        ("likeliest", "p.likeliest", Text),
        ("beta", "p.beta", Real),
        ("report", "p.report", Json),
        ("capture", "p.capture", Json),
    ],
    tables: "responses p JOIN rounds r ON r.id = p.round",
    of_uid: Some("p.uid = $U"),
    order: &[3, 0, 5],
    first: &[BEFORE_TEXT, BEFORE_ALL],
    // Captures may be large.
    page: 32,
};

static SAMPLES: Source = Source {
    columns: &[
        ("round", "s.round", Text),
        ("netuid", "s.netuid", Integer),
        ("block", "s.block", Integer),
        ("at_ms", "s.at_ms", Integer),
        ("model", "s.model", Text),
        ("uid", "s.uid", Integer),
        ("hotkey", "s.hotkey", Text),
        ("tps", "s.tps", Real),
    ],
    tables: "samples s",
    of_uid: Some("s.uid = $U"),
    order: &[3, 0, 5],
    first: &[BEFORE_TEXT, BEFORE_ALL],
    page: 2_000,
};

static WEIGHTS: Source = Source {
    columns: &[
        ("netuid", "w.netuid", Integer),
        ("epoch", "w.epoch", Integer),
        ("block", "w.block", Integer),
        ("planned_ms", "w.planned_ms", Integer),
        ("state", "w.state", Text),
        ("extrinsic", "w.extrinsic", Text),
        ("after_block", "w.after_block", Integer),
        ("until_block", "w.until_block", Integer),
        ("reveal_round", "w.reveal_round", Integer),
        ("why", "w.why", Text),
        ("weights", "w.weights", Json),
        ("explanation", "w.explanation", Json),
    ],
    tables: "weights w",
    of_uid: None,
    order: &[3, 0, 1],
    first: &[BEFORE_ALL, BEFORE_ALL],
    page: 50,
};

impl What {
    fn source(self) -> &'static Source {
        match self {
            Self::Rounds => &ROUNDS,
            Self::Responses => &RESPONSES,
            Self::Samples => &SAMPLES,
            Self::Weights => &WEIGHTS,
        }
    }

    /// Whether rows are of one uid.
    pub fn has_uid(self) -> bool {
        self.source().of_uid.is_some()
    }

    /// Names of the columns, in the order of cells.
    pub fn columns(self) -> Vec<&'static str> {
        self.source().columns.iter().map(|(name, ..)| *name).collect()
    }
}

impl Source {
    fn sql(&self, uid: Option<u16>) -> String {
        let columns =
            self.columns.iter().map(|(name, expression, _)| format!("{expression} AS {name}"));
        let order = self.order.iter().map(|place| self.columns[*place].1).collect::<Vec<_>>();
        let cursor = (1..=order.len()).map(|n| format!("${n}")).collect::<Vec<_>>();
        let uid = match (uid, self.of_uid) {
            (Some(uid), Some(of_uid)) => format!(" AND {}", of_uid.replace("$U", &uid.to_string())),
            _ => String::new(),
        };
        format!(
            "SELECT {} FROM {} WHERE ({order}) > ({}){uid} ORDER BY {order} LIMIT {}",
            columns.collect::<Vec<_>>().join(", "),
            self.tables,
            cursor.join(", "),
            self.page,
            order = order.join(", "),
        )
    }
}

/// An export under way.
pub struct Export {
    store: Store,
    source: &'static Source,
    sql: String,
    /// Where the next page starts; none at the end.
    cursor: Option<Vec<Bound<'static>>>,
}

impl Store {
    /// Begins an export, oldest first. `filter.uid` counts where [`What::has_uid`].
    pub fn export(&self, what: What, filter: Filter) -> Export {
        let source = what.source();
        let since = i64::try_from(filter.since_ms).unwrap_or(i64::MAX);
        let mut cursor = vec![since.into()];
        cursor.extend(source.first.iter().cloned());
        Export { store: self.clone(), source, sql: source.sql(filter.uid), cursor: Some(cursor) }
    }
}

impl Export {
    /// The next rows; none at the end.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn next(&mut self) -> Result<Vec<Vec<Cell>>, StoreError> {
        let Some(cursor) = &self.cursor else { return Ok(Vec::new()) };
        let mut session = self.store.read("export").await?;
        let rows = session.rows(&self.sql, cursor.clone()).await?;
        let read = rows.iter().map(|row| cells(self.source, row)).collect::<Result<Vec<_>, _>>();
        let read = read.map_err(|cause| session.error(cause))?;
        session.commit().await?;
        self.cursor = read.last().map(|last| {
            let key = self.source.order.iter().map(|place| bound(&last[*place]));
            key.collect()
        });
        Ok(read)
    }
}

fn cells(source: &Source, row: &AnyRow) -> Result<Vec<Cell>, Cause> {
    let cell = |(name, _, kind): &(&str, &str, Kind)| {
        Ok(match kind {
            Integer => get::<Option<i64>>(row, name)?.map_or(Cell::Null, Cell::Integer),
            Real => get::<Option<f64>>(row, name)?.map_or(Cell::Null, Cell::Real),
            Text => get::<Option<String>>(row, name)?.map_or(Cell::Null, Cell::Text),
            Json => get::<Option<String>>(row, name)?.map_or(Cell::Null, Cell::Json),
        })
    };
    source.columns.iter().map(cell).collect()
}

fn bound(cell: &Cell) -> Bound<'static> {
    match cell {
        Cell::Null => Bound::Integer(None),
        Cell::Integer(value) => (*value).into(),
        Cell::Real(value) => (*value).into(),
        Cell::Text(text) | Cell::Json(text) => text.clone().into(),
    }
}
