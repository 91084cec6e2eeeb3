//! Writes the page of `verify --html`, with every token of the checked answers, tables and plots.
//! The page needs nothing from outside and runs nothing; whatever came from a peer is escaped text.

use super::checked::{CheckedAnswer, number};
use crate::verify::ChunkEvidence;
use crate::verify::RowEvidence;
use crate::verify::Verdict;
use crate::verify::capture::CheckedChoice;
use anyhow::anyhow;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use plotters::prelude::{
    BLUE, ChartBuilder, Circle, Color, DrawingAreaErrorKind, IntoDrawingArea, LineSeries, RED,
    SVGBackend, WHITE,
};
use std::collections::HashMap;

/// Tokens and table rows that are shown of an answer.
const TOKENS_MAX: usize = 8192;
/// Points of a plot.
const POINTS_MAX: usize = 2048;
/// Pixels of a plot.
const PLOT_SIZE: (u32, u32) = (720, 200);

const STYLE: &str = "
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
.tokens { font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border-radius: 2px; }
.pass { color: #176b2c; } .reject { color: #a11212; } .unscored { color: #7a5b00; }
.first { background: #e3f4e3; } .few { background: #eef3d8; } .some { background: #fbeec5; }
.rare { background: #fbd9b5; } .margin { background: #f7b6b0; }
.over { background: #d92b2b; color: #fff; } .unseen { color: #777; }
.far { border-bottom: 2px solid #a11212; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: 0 .6em; text-align: right; }
figure { display: inline-block; margin: .5em 1em .5em 0; }
";

/// The whole page.
pub(super) fn page(file: &str, sections: &[Markup]) -> String {
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy);
                title { "Verification of " (file) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "Verification of " (file) }
                (legend())
                @for section in sections {
                    (section)
                }
            }
        }
    };
    page.into_string()
}

fn legend() -> Markup {
    let classes = [
        ("first", "the most probable token"),
        ("few", "rank 2 to 5"),
        ("some", "rank 6 to 25"),
        ("rare", "a higher rank"),
        ("margin", "not what the sampler draws, within the limit"),
        ("over", "not what the sampler draws, over the limit"),
        ("far", "hidden rows over the limit"),
        ("unseen", "not scored"),
    ];
    html! {
        p {
            @for (class, words) in classes {
                span class=(class) { (words) }
                " "
            }
        }
    }
}

/// A line of which no choice could be checked.
pub(super) fn unread(place: &str, verdict: &Verdict) -> Markup {
    html! {
        section {
            h2 { (place) }
            (outcome(verdict))
        }
    }
}

fn outcome(verdict: &Verdict) -> Markup {
    let class = match verdict {
        Verdict::Pass => "pass",
        Verdict::Reject(_) => "reject",
        Verdict::Unscored(_) => "unscored",
    };
    html! {
        p class=(class) { strong { (verdict.to_string()) } }
    }
}

/// The part of the page about one answer.
pub(super) fn section(finding: &CheckedAnswer<'_>) -> anyhow::Result<Markup> {
    let CheckedChoice { choice, report, seconds, .. } = finding.checked;
    let (tokens, scored, rules) = (finding.tokens(), report.rows.len(), finding.rules());
    let summary = format!("{tokens} tokens, {scored} rows scored, {rules}, {seconds:.3} s");
    let plots = plots(finding)?;
    Ok(html! {
        section {
            h2 { (finding.place) ", choice " (choice) }
            (outcome(&report.verdict))
            p { (summary) }
            @if let Some(tally) = finding.tally {
                p { (tally.describe()) }
            }
            (text(finding))
            @for (title, plot) in &plots {
                figure {
                    figcaption { (title) }
                    (PreEscaped(plot))
                }
            }
            (table(finding))
        }
    })
}

/// The tokens in a row, coloured by margin and rank.
fn text(finding: &CheckedAnswer<'_>) -> Markup {
    let Some(answer) = &finding.checked.answer else { return PreEscaped(String::new()) };
    let rows: HashMap<usize, &RowEvidence> =
        finding.checked.report.rows.iter().map(|r| (r.index, r)).collect();
    let hidden = answer.ids.len().saturating_sub(TOKENS_MAX);
    html! {
        p class="tokens" {
            @for (index, id) in answer.ids.iter().enumerate().take(TOKENS_MAX) {
                @let row = rows.get(&index).copied();
                span class=(class(finding, index, row)) title=(title(index, *id, row)) {
                    (finding.model.tokenizer.text_of(*id))
                }
            }
        }
        @if hidden > 0 {
            p { (hidden) " more tokens are not shown." }
        }
    }
}

fn class(finding: &CheckedAnswer<'_>, index: usize, row: Option<&RowEvidence>) -> String {
    let colour = match row {
        None => "unseen",
        Some(row) if finding.is_unlikely(row.margin) => "over",
        Some(row) if row.margin.is_some_and(|m| m > 0.0) => "margin",
        Some(RowEvidence { rank: 0..=1, .. }) => "first",
        Some(RowEvidence { rank: 2..=5, .. }) => "few",
        Some(RowEvidence { rank: 6..=25, .. }) => "some",
        Some(_) => "rare",
    };
    match finding.chunk(index) {
        Some(chunk) if finding.is_far(chunk) => format!("{colour} far"),
        _ => colour.to_owned(),
    }
}

fn title(index: usize, id: u32, row: Option<&RowEvidence>) -> String {
    let scores = row.map_or_else(
        || "not scored".to_owned(),
        |r| format!("rank {}, margin {}", r.rank, number(r.margin)),
    );
    format!("token {index}, id {id}, {scores}")
}

fn table(finding: &CheckedAnswer<'_>) -> Markup {
    let columns =
        ["token", "id", "text", "miner's log-prob", "our log-prob", "rank", "margin", "energy"];
    let mark = |is_over: bool| if is_over { "over" } else { "" };
    html! {
        table {
            thead {
                tr {
                    @for column in columns {
                        th { (column) }
                    }
                }
            }
            tbody {
                @for row in finding.checked.report.rows.iter().take(TOKENS_MAX) {
                    @let is_far = finding.chunk(row.index).is_some_and(|c| finding.is_far(c));
                    @let text = finding.model.tokenizer.text_of(row.token);
                    tr {
                        td { (row.index) }
                        td { (row.token) }
                        td { code { (format!("{text:?}")) } }
                        td { (number(row.reported)) }
                        td { (number(Some(row.logprob))) }
                        td { (row.rank) }
                        td class=(mark(finding.is_unlikely(row.margin))) { (number(row.margin)) }
                        td class=(mark(is_far)) { (finding.energy(row.index)) }
                    }
                }
            }
        }
    }
}

/// Points over tokens or chunks.
struct Plot {
    title: &'static str,
    across: &'static str,
    points: Vec<(f64, f64)>,
    limit: Option<f64>,
    /// Heights are decimal logarithms.
    is_log: bool,
}

/// The plots of an answer that have points: what they show, and SVG.
fn plots(finding: &CheckedAnswer<'_>) -> anyhow::Result<Vec<(&'static str, String)>> {
    let report = &finding.checked.report;
    let of_rows = |value: &dyn Fn(&RowEvidence) -> Option<f64>| -> Vec<(f64, f64)> {
        report.rows.iter().filter_map(|r| Some((r.index as f64, value(r)?))).collect()
    };
    let energy = |c: &ChunkEvidence| {
        // As that of a whole chunk, which the limit is one of.
        let energy = if c.is_exact { 0.0 } else { c.energy? / c.limit(1.0) };
        Some((c.index as f64, energy))
    };
    let across = "token";
    let all = [
        Plot {
            title: "Difference of log-probabilities, miner's and ours",
            across,
            points: of_rows(&|r| Some((r.logprob - r.reported?).abs())),
            limit: None,
            is_log: false,
        },
        Plot {
            title: "Rank",
            across,
            points: of_rows(&|r| Some(f64::from(r.rank.max(1)).log10())),
            limit: None,
            is_log: true,
        },
        Plot {
            title: "Margin, in logits, and its limit",
            across,
            points: of_rows(&|r| r.margin),
            limit: Some(finding.limits.margin_max()),
            is_log: false,
        },
        Plot {
            title: "Energy of a chunk, and its limit where rounding explains no more",
            across: "chunk",
            points: report.chunks.iter().filter_map(energy).collect(),
            limit: finding.checked.scheme.and_then(|s| finding.limits.energy(s)),
            is_log: false,
        },
    ];
    let shown = all.into_iter().filter(|plot| !plot.points.is_empty());
    shown.map(|plot| Ok((plot.title, plot.svg()?))).collect()
}

impl Plot {
    fn svg(&self) -> anyhow::Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| anyhow!("the plot `{}`: {e}", self.title))?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let (points, limit) = (self.thinned(), self.limit.filter(|l| l.is_finite()));
        let highest = points.iter().map(|p| p.1).chain(limit).fold(0.0, f64::max);
        let height = if highest > 0.0 { 1.1 * highest } else { 1.0 };
        let width = points.last().map_or(0.0, |p| p.0) + 1.0;
        let label = |value: &f64| match self.is_log {
            true => format!("{:.0}", 10_f64.powf(*value)),
            false => format!("{value:.3}"),
        };
        let area = SVGBackend::with_string(svg, PLOT_SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..width, 0.0..height)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .y_labels(5)
            .x_desc(self.across)
            .x_label_formatter(&|value: &f64| format!("{value:.0}"))
            .y_label_formatter(&label)
            .draw()?;
        if let Some(limit) = limit {
            chart.draw_series(LineSeries::new([(0.0, limit), (width, limit)], RED))?;
        }
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 2, BLUE.filled())))?;
        area.present()
    }

    /// Points that can be drawn, at most [`POINTS_MAX`]: of neighbours the highest stays.
    fn thinned(&self) -> Vec<(f64, f64)> {
        let finite: Vec<(f64, f64)> =
            self.points.iter().copied().filter(|p| p.1.is_finite()).collect();
        let group = finite.len().div_ceil(POINTS_MAX).max(1);
        let highest = |few: &[(f64, f64)]| few.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
        finite.chunks(group).filter_map(highest).collect()
    }
}
