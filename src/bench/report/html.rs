//! Writes a report as one page with tables and plots. The page needs nothing from outside and runs
//! nothing; names of models and servers are escaped text.

use super::markdown::{LEVEL_COLUMNS, ROW_COLUMNS, ROWS_LEGEND, facts, legend, level, row};
use super::plots;
use super::schema::BenchReport;
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = "
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 82em; padding: 0 1em; }
.doubt { background: #fbeec5; border-left: 4px solid #c88a00; padding: .4em 1em; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1.5em; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: 0 .6em; text-align: right; }
figure { display: inline-block; margin: .5em 1em .5em 0; }
figcaption { font-weight: bold; }
";

/// Writes it.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn write(report: &BenchReport) -> anyhow::Result<String> {
    let plots = plots::all(report)?;
    let title = format!("Measurement of {}", report.model.name);
    let body = html! {
        h1 { (title) }
        (doubts(report))
        dl {
            @for (name, value) in facts(report) {
                dt { (name) }
                dd { (value) }
            }
        }
        @if !report.rows.is_empty() {
            (table(&ROW_COLUMNS, report.rows.iter().map(row)))
            p { (ROWS_LEGEND) }
        }
        @if !report.levels.is_empty() {
            (table(&LEVEL_COLUMNS, report.levels.iter().map(level)))
            p { (legend(report)) }
        }
        @for (title, plot) in &plots {
            figure {
                figcaption { (title) }
                (PreEscaped(plot))
            }
        }
    };
    Ok(page(&title, body))
}

/// A page that may load nothing and run nothing.
pub(super) fn page(title: &str, body: Markup) -> String {
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy);
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body { (body) }
        }
    };
    page.into_string()
}

fn doubts(report: &BenchReport) -> Markup {
    html! {
        @if report.is_partial {
            p class="doubt" { "Partial: the measurement did not run to its end." }
        }
        @for mark in &report.marks {
            p class="doubt" { strong { (mark.kind.name()) } ": " (mark.what) }
        }
    }
}

/// A table of text.
pub(super) fn table<R>(columns: &[impl AsRef<str>], rows: impl Iterator<Item = R>) -> Markup
where
    R: IntoIterator,
    R::Item: AsRef<str>,
{
    html! {
        table {
            thead {
                tr {
                    @for column in columns {
                        th { (column.as_ref()) }
                    }
                }
            }
            tbody {
                @for row in rows {
                    tr {
                        @for cell in row {
                            td { (cell.as_ref()) }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::bench::conditions::{Mark, MarkKind};
    use crate::bench::report::seal::tests::sample;

    #[test]
    fn a_page_holds_all_and_runs_nothing() {
        let mut report = sample(10.0);
        report.marks.push(Mark::new(MarkKind::Busy, "<b>others</b>"));
        let page = super::write(&report).unwrap();
        assert!(page.contains("Measurement of m&lt;script&gt;") && !page.contains("<script"));
        assert!(page.contains("&lt;b&gt;others&lt;/b&gt;"), "{page}");
        assert_eq!(page.matches("<svg").count(), 3);
        for word in ["src=", "href=", "url("] {
            assert!(!page.contains(word), "{word}");
        }
    }
}
