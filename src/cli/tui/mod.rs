//! Runs `validate --tui`: a live view of rounds, miners and weights on a terminal.
//!
//! The driver publishes views; a thread of its own draws them and reads keys. The terminal is put
//! back however the program ends: by the guard's drop, in a panic of the main thread or of this
//! one, and by [`restore`] before the process is ended from elsewhere.

mod draw;

use super::{Failure, logging};
use crate::validator::run::view::View;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use std::io::{IsTerminal, Stdout};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often it looks for keys, views and log lines.
const LOOK: Duration = Duration::from_millis(200);
/// Rows of a page.
const PAGE: usize = 10;

/// Whether the terminal is ours.
static IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// Checks that there is a terminal.
///
/// # Errors
/// When input or output is not a terminal.
pub(super) fn check() -> Result<(), Failure> {
    for (is_terminal, name) in
        [(std::io::stdin().is_terminal(), "stdin"), (std::io::stdout().is_terminal(), "stdout")]
    {
        if !is_terminal {
            let what = format!("--tui needs a terminal, and {name} is not one");
            let hint = "without --tui the log says the same in lines";
            return Err(Failure::user(what).with_hint(Some(hint)));
        }
    }
    Ok(())
}

/// Puts the terminal back, where it is taken.
pub(super) fn restore() {
    if IS_TAKEN.swap(false, SeqCst) {
        // Whether or not it works, there is nobody left to tell.
        let _ = disable_raw_mode();
        let _ = execute!(std::io::stdout(), LeaveAlternateScreen, Show);
        logging::to_stderr();
    }
}

/// A view on the terminal. Dropped, it puts the terminal back.
pub(super) struct Tui {
    ended: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Tui {
    fn drop(&mut self) {
        self.ended.cancel();
        if let Some(thread) = self.thread.take() {
            // Its panic was reported when it happened.
            let _ = thread.join();
        }
        restore();
    }
}

impl Tui {
    /// Takes the terminal and shows `views` until dropped. A key that ends it cancels `stop`.
    ///
    /// # Errors
    /// When the terminal cannot be taken.
    pub(super) fn start(
        views: watch::Receiver<Arc<View>>,
        stop: CancellationToken,
    ) -> Result<Self, Failure> {
        restore_in_panics();
        let failed = |e| Failure::ours(format!("--tui: the terminal cannot be taken: {e}"));
        IS_TAKEN.store(true, SeqCst);
        let ended = CancellationToken::new();
        // From here on the guard puts it back.
        let mut tui = Self { ended: ended.clone(), thread: None };
        logging::to_memory();
        enable_raw_mode().map_err(failed)?;
        execute!(std::io::stdout(), EnterAlternateScreen).map_err(failed)?;
        let terminal = Terminal::new(CrosstermBackend::new(std::io::stdout())).map_err(failed)?;
        let show = move || {
            if let Err(e) = run(terminal, views, &stop, &ended) {
                restore();
                tracing::error!("the view has ended, the validator goes on: {e}");
            }
        };
        let thread = std::thread::Builder::new().name(NAME.into()).spawn(show);
        tui.thread = Some(thread.map_err(failed)?);
        Ok(tui)
    }
}

/// The thread that draws.
const NAME: &str = "tui";

/// A panic of a part that others catch leaves the view alone, and is a line in its log.
fn restore_in_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        if !IS_TAKEN.load(SeqCst) {
            before(info);
        } else if matches!(thread.name(), Some("main" | NAME)) {
            restore();
            before(info);
        } else {
            tracing::error!("a part broke: {info}");
        }
    }));
}

fn run(
    mut terminal: Terminal<CrosstermBackend<Stdout>>,
    mut views: watch::Receiver<Arc<View>>,
    stop: &CancellationToken,
    ended: &CancellationToken,
) -> std::io::Result<()> {
    let (mut first, mut last) = (0usize, 0);
    while !ended.is_cancelled() {
        let view = Arc::clone(&views.borrow_and_update());
        let log = logging::remembered();
        terminal.draw(|frame| last = draw::draw(frame, &view, &log, first))?;
        if !event::poll(LOOK)? {
            continue;
        }
        let Event::Key(key) = event::read()? else { continue };
        if key.kind == KeyEventKind::Release {
            continue;
        }
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        first = match key.code {
            KeyCode::Char('q') => quit(stop, first),
            KeyCode::Char('c') if is_control => quit(stop, first),
            KeyCode::Up => first.saturating_sub(1),
            KeyCode::Down => first + 1,
            KeyCode::PageUp => first.saturating_sub(PAGE),
            KeyCode::PageDown => first + PAGE,
            _ => first,
        }
        .min(last);
    }
    Ok(())
}

/// Stops the validator; the second time the program, at once.
fn quit(stop: &CancellationToken, first: usize) -> usize {
    if stop.is_cancelled() {
        restore();
        std::process::exit(1);
    }
    stop.cancel();
    first
}
