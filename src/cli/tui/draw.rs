//! Draws the view: a pure function of the state, the newest log lines and the scroll position.

use crate::cli::printable::printable;
use crate::store::record::{Timing, WeightsState};
use crate::validator::round::{MinerState, RoundPhase};
use crate::validator::run::view::{MinerView, View};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Gauge, Paragraph, Row, Table};

/// Lines of the log that are shown, and lines of rounds.
const LOG_LINES: u16 = 5;
const ROUND_LINES: u16 = 3;
/// Cells of a bar of weights.
const BAR: usize = 10;

/// Draws all of it. `first` is the first row of miners; the answer is how far it may go.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View, log: &[String], first: usize) -> usize {
    let parts = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(ROUND_LINES + 1),
        Constraint::Min(3),
        Constraint::Length(LOG_LINES + 1),
        Constraint::Length(1),
    ];
    let [head, epoch, rounds, miners, lines, keys] = Layout::vertical(parts).areas(frame.area());
    frame.render_widget(Paragraph::new(title(view)), head);
    draw_epoch(frame, view, epoch);
    draw_rounds(frame, view, rounds);
    let last = draw_miners(frame, view, first, miners);
    let newest = log.len().saturating_sub(usize::from(LOG_LINES));
    let text: Vec<Line<'_>> = log[newest..].iter().map(|l| Line::raw(printable(l))).collect();
    frame.render_widget(Paragraph::new(text).block(Block::new().title("─ log ")), lines);
    let help = "q or Ctrl-C stops, twice at once · ↑ ↓ PgUp PgDn scroll";
    let dim = Style::new().add_modifier(Modifier::DIM);
    frame.render_widget(Paragraph::new(Line::styled(help, dim)), keys);
    last
}

fn title(view: &View) -> Line<'static> {
    let View { netuid, own, block, ended, unsaved, .. } = view;
    let mut text = format!("subnet {netuid} · validator {own} · block {block} · {ended} rounds");
    if *unsaved > 0 {
        text += &format!(" · {unsaved} not remembered yet");
    }
    if view.is_stopping {
        text += " · stopping";
    }
    Line::styled(text, Style::new().add_modifier(Modifier::BOLD))
}

fn draw_epoch(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let (began, length) = view.epoch;
    let passed = view.block.saturating_sub(began).min(length);
    let last = match &view.weights {
        None => "no weights in this run yet".to_owned(),
        Some((epoch, state)) => format!("weights of epoch {epoch} {}", words(state)),
    };
    let label = format!("epoch {began}: block {passed} of {length} · {last}");
    let ratio = passed as f64 / length.max(1) as f64;
    let style = Style::new().fg(Color::Blue).bg(Color::Black);
    frame.render_widget(Gauge::default().ratio(ratio).label(label).gauge_style(style), area);
}

fn words(state: &WeightsState) -> &'static str {
    match state {
        WeightsState::Planned => "decided, not sent",
        WeightsState::Sent { .. } => "sent",
        WeightsState::Committed { .. } => "committed",
        WeightsState::Confirmed => "on the chain",
        WeightsState::Failed { .. } => "not set",
    }
}

fn draw_rounds(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let line = |round: &crate::validator::run::view::RunningRound| {
        let phase = match round.phase {
            RoundPhase::Prompting => "makes a prompt",
            RoundPhase::Asking => "asks",
            RoundPhase::Checking => "verifies",
            RoundPhase::Ended => "is over",
        };
        let id: String = round.id.chars().take(8).collect();
        let (model, block) = (printable(&round.model), round.block);
        Line::raw(format!("{id}  block {block}  {phase}  {model}"))
    };
    let mut lines: Vec<Line<'_>> = view.rounds.iter().map(line).collect();
    if lines.is_empty() {
        lines.push(Line::raw("none"));
    }
    frame.render_widget(Paragraph::new(lines).block(Block::new().title("─ rounds ")), area);
}

fn draw_miners(frame: &mut Frame<'_>, view: &View, first: usize, area: Rect) -> usize {
    let shown = usize::from(area.height.saturating_sub(2));
    let last = view.miners.len().saturating_sub(shown);
    let sum: f64 = view.to_come.values().map(|weight| f64::from(*weight)).sum();
    let share = |uid| view.to_come.get(uid).map_or(0.0, |weight| f64::from(*weight) / sum);
    let rows = view.miners.iter().skip(first.min(last)).take(shown);
    let rows = rows.map(|(uid, miner)| row(*uid, miner, share(uid)));
    let header = ["uid", "hotkey", "now", "TTFT s", "tok/s", "verdict", "ok/all", "weight to come"];
    let widths = [
        Constraint::Length(4),
        Constraint::Length(12),
        Constraint::Length(11),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Min(18),
        Constraint::Length(9),
        Constraint::Length(18),
    ];
    let title = format!("─ miners: {} ", view.miners.len());
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let table = Table::new(rows, widths).header(Row::new(header).style(bold));
    frame.render_widget(table.block(Block::new().title(title)), area);
    last
}

fn row(uid: u16, miner: &MinerView, share: f64) -> Row<'static> {
    let hotkey: String = miner.hotkey.chars().take(11).chain(['…']).collect();
    let last = miner.last.as_ref().map(|last| last.timing);
    let (now, timing) = match miner.state {
        None => ("", last),
        Some(MinerState::NotServed) => ("not served", last),
        Some(MinerState::Asked) => ("asked", last),
        Some(MinerState::Checking(timing)) => ("verifying", Some(timing)),
        Some(MinerState::Done(timing, _)) => ("done", Some(timing)),
    };
    let timing = timing.filter(|timing| timing.tokens > 0);
    let number = |value: fn(&Timing) -> f64, digits: usize| {
        timing.as_ref().map_or("-".to_owned(), |timing| format!("{:.digits$}", value(timing)))
    };
    let all: u64 = miner.counts.values().sum();
    let good = miner.counts.get("verified").copied().unwrap_or(0);
    let filled = (share * BAR as f64).round().clamp(0.0, BAR as f64) as usize;
    let bar = format!("{}{} {share:.4}", "█".repeat(filled), "░".repeat(BAR - filled));
    Row::new([
        Cell::new(uid.to_string()),
        Cell::new(hotkey),
        Cell::new(now),
        Cell::new(number(|t| t.first_token, 3)),
        Cell::new(number(|t| t.tps, 1)),
        Cell::new(verdict(miner)),
        Cell::new(format!("{good}/{all}")),
        Cell::new(bar),
    ])
}

fn verdict(miner: &MinerView) -> Line<'static> {
    use crate::store::record::Outcome;
    let Some(last) = &miner.last else { return Line::raw("-") };
    let color = match last.outcome {
        Outcome::Verified => Color::Green,
        Outcome::Rejected => Color::Red,
        Outcome::Failed | Outcome::NotServed => Color::Yellow,
        Outcome::Unscored => Color::DarkGray,
    };
    let mut parts = vec![Span::styled(last.outcome.name(), Style::new().fg(color))];
    if let Some(cause) = &last.cause {
        parts.push(Span::raw(format!(" {}", printable(cause))));
    }
    Line::from(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::record::Outcome;
    use crate::validator::run::view::{Last, RunningRound};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn view() -> View {
        let timing =
            Timing { first_token: 0.125, all_tokens: 1.0, total: 1.125, tps: 42.0, tokens: 48 };
        let last = |outcome, cause: Option<&str>| {
            Some(Last { timing, outcome, cause: cause.map(str::to_owned) })
        };
        let miner = |state, last| MinerView {
            hotkey: "5F3sa2TJAWMqDhXG6jhV4N8ko9SxwGy8TpaNS1repo5EYjQX".into(),
            state,
            last,
            counts: [("verified", 2), ("rejected", 1)].into(),
        };
        let running = |phase| RunningRound {
            id: "0123456789abcdef".into(),
            model: "tiny\u{1b}[2J".into(),
            block: 99,
            phase,
        };
        View {
            netuid: 4,
            own: 7,
            block: 130,
            epoch: (100, 120),
            ended: 3,
            rounds: vec![running(RoundPhase::Checking), running(RoundPhase::Asking)],
            miners: [
                (1, miner(Some(MinerState::Checking(timing)), last(Outcome::Verified, None))),
                (2, miner(Some(MinerState::Asked), last(Outcome::Rejected, Some("A\u{1b}]0;x")))),
                (3, MinerView { hotkey: "5C".into(), ..MinerView::default() }),
            ]
            .into(),
            weights: Some((0, WeightsState::Confirmed)),
            to_come: [(1, 65_535), (2, 21_845)].into(),
            ..View::default()
        }
    }

    /// The lines of a picture, without blanks at their ends.
    fn lines(view: &View, log: &[String], first: usize, (wide, high): (u16, u16)) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(wide, high)).unwrap();
        terminal
            .draw(|frame| {
                draw(frame, view, log, first);
            })
            .unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..wide).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..high).map(|y| line(y).trim_end().to_owned()).collect()
    }

    #[test]
    fn everything_has_its_place() {
        let log = vec!["an old line".to_owned(); 9];
        let found = lines(&view(), &[log, vec!["the newest".into()]].concat(), 0, (110, 22));
        assert_eq!(found[0], "subnet 4 · validator 7 · block 130 · 3 rounds");
        assert!(found[1].contains("epoch 100: block 30 of 120 · weights of epoch 0 on the chain"));
        assert_eq!(found[3], "01234567  block 99  verifies  tiny\\u001b[2J");
        let row = |uid: &str| found.iter().find(|line| line.starts_with(uid)).unwrap().clone();
        let fields = |uid| row(uid).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            fields("1 "),
            [
                "1",
                "5F3sa2TJAWM…",
                "verifying",
                "0.125",
                "42.0",
                "verified",
                "2/3",
                "████████░░",
                "0.7500"
            ]
        );
        assert_eq!(fields("2 ")[2..6], ["asked", "0.125", "42.0", "rejected"]);
        assert!(row("2 ").contains("A\\u001b]0;x") && row("2 ").contains("0.2500"));
        assert_eq!(fields("3 ")[2..6], ["-", "-", "-", "0/0"]);
        assert!(found[20].contains("the newest") && found[21].contains("stops"), "{found:?}");
        // No picture of anything holds what steers a terminal.
        assert!(found.iter().all(|line| !line.contains('\u{1b}')));
    }

    #[test]
    fn scrolling_and_small_terminals_lose_nothing() {
        let mut view = view();
        let one = view.miners[&1].clone();
        view.miners = (0..200).map(|uid| (uid, one.clone())).collect();
        let found = lines(&view, &[], 10_000, (110, 22));
        assert!(found.iter().any(|line| line.starts_with("199 ")), "{found:?}");
        let found = lines(&view, &[], 100, (110, 22));
        assert!(found.iter().any(|line| line.starts_with("100 ")), "{found:?}");
        view.is_stopping = true;
        view.unsaved = 2;
        for size in [(1, 1), (20, 5), (300, 100)] {
            lines(&view, &["a".into()], 3, size);
        }
        assert!(lines(&view, &[], 0, (110, 22))[0].ends_with("2 not remembered yet · stopping"));
        lines(&View::default(), &[], 0, (80, 24));
    }
}
