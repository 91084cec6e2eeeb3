//! Holds a table with the lines around it, for `bench compare` and `bench plan`, and writes it as
//! Markdown or as a page of its own.

use super::html::{page, table};
use comfy_table::{Table, presets};
use maud::html;

/// A table with the lines around it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Sheet {
    /// What the page is called.
    pub title: String,
    /// Lines before the table.
    pub before: Vec<String>,
    /// The table's head.
    pub columns: Vec<String>,
    /// Cells, as many in each row as there are columns.
    pub rows: Vec<Vec<String>>,
    /// Lines after the table.
    pub after: Vec<String>,
}

impl Sheet {
    /// The same with every line and cell replaced by what `text` makes of it.
    #[must_use]
    pub fn map(self, text: impl Fn(&str) -> String) -> Self {
        let all = |lines: Vec<String>| lines.iter().map(|line| text(line)).collect();
        Self {
            title: text(&self.title),
            before: all(self.before),
            columns: all(self.columns),
            rows: self.rows.into_iter().map(&all).collect(),
            after: all(self.after),
        }
    }

    /// The lines and the table, for a terminal and for a page of text.
    pub fn markdown(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header(&self.columns);
        table.add_rows(&self.rows);
        let table = [table.to_string()];
        let lines: Vec<&str> =
            self.before.iter().chain(&table).chain(&self.after).map(String::as_str).collect();
        lines.join("\n")
    }

    /// A page that needs nothing from outside and runs nothing; every cell is escaped text.
    pub fn html(&self) -> String {
        let body = html! {
            h1 { (self.title) }
            @for line in &self.before { p { (line) } }
            (table(&self.columns, self.rows.iter()))
            ul { @for line in &self.after { li { (line.trim()) } } }
        };
        page(&self.title, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sheet_is_written_as_text_and_as_a_page() {
        let texts = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let sheet = Sheet {
            title: "A <title>".into(),
            before: texts(&["first"]),
            columns: texts(&["a", "b"]),
            rows: vec![texts(&["1", "<b>"])],
            after: texts(&["  last"]),
        };
        assert_eq!(sheet.markdown(), "first\n| a | b   |\n|---|-----|\n| 1 | <b> |\n  last");
        let page = sheet.html();
        assert!(page.contains("<h1>A &lt;title&gt;</h1>") && page.contains("<li>last</li>"));
        assert!(page.contains("<td>&lt;b&gt;</td>") && !page.contains("<b>"), "{page}");
        assert!(page.contains("default-src 'none'"), "{page}");
        let loud = sheet.map(str::to_uppercase);
        assert_eq!(loud.markdown(), "FIRST\n| A | B   |\n|---|-----|\n| 1 | <B> |\n  LAST");
        assert_eq!(loud.title, "A <TITLE>");
    }
}
