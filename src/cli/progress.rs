//! Shows the progress of downloads and of loading, and memory plans, to people at a terminal.

use super::out::note;
use super::tables::bordered;
use crate::engine::plan::Bytes;
use crate::lifecycle::load::{Plans, Progress};
use crate::models::device::Device;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io::IsTerminal;

/// The plans as a table for people, and the memory that each device has for them.
pub(super) fn table(rows: &Plans, free: &[(Device, u64)]) -> String {
    let mut table =
        bordered(["model", "weights", "KV cache", "workspace", "total", "sequences x context"]);
    for (name, plan) in rows {
        match plan {
            Ok(p) => table.add_row([
                name.clone(),
                Bytes(p.weights).to_string(),
                Bytes(p.kv).to_string(),
                Bytes(p.workspace).to_string(),
                Bytes(p.total()).to_string(),
                format!("{} x {}", p.options.sequences_max, p.options.context_max),
            ]),
            Err(why) => table.add_row([name.clone(), format!("cannot be served: {why}")]),
        };
    }
    format!("{table}\navailable memory: {}", memory(free))
}

/// Of the processor alone, only the bytes.
fn memory(free: &[(Device, u64)]) -> String {
    match free {
        [(Device::Cpu, bytes)] => Bytes(*bytes).to_string(),
        all => {
            let each = all.iter().map(|(device, bytes)| format!("{device} {}", Bytes(*bytes)));
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

fn draw_target() -> ProgressDrawTarget {
    match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|e| unreachable!("template {template}: {e}"))
}

/// One bar for each file that is being downloaded and each model that is being loaded; without a
/// terminal, one log line a file.
pub(super) struct Bars {
    files: Group,
    models: Group,
}

/// Bars of one kind, by name.
struct Group {
    all: MultiProgress,
    template: &'static str,
    bars: Mutex<HashMap<String, ProgressBar>>,
}

impl Group {
    fn new(template: &'static str) -> Self {
        let all = MultiProgress::with_draw_target(draw_target());
        Self { all, template, bars: Mutex::default() }
    }

    fn set(&self, name: &str, done: u64, total: u64) -> ProgressBar {
        let mut bars = self.bars.lock();
        let bar = bars.entry(name.to_owned()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(total).with_message(name.to_owned()));
            bar.set_style(style(self.template));
            bar
        });
        bar.set_length(total);
        bar.set_position(done);
        bar.clone()
    }
}

impl Bars {
    pub(super) fn new() -> Self {
        Self {
            files: Group::new("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}"),
            models: Group::new("{msg} {wide_bar} layer {pos}/{len}"),
        }
    }
}

impl Progress for Bars {
    fn file(&self, file: &str, done: u64, total: u64) {
        let bar = self.files.set(file, done, total);
        if done == total && !bar.is_finished() {
            bar.finish_and_clear();
            tracing::info!(file, bytes = total, "fetched");
        }
    }

    fn planned(&self, plans: &Plans, free: &[(Device, u64)]) {
        note!("{}", table(plans, free));
    }

    fn layers(&self, model: &str, done: usize, total: usize) {
        self.models.set(model, done as u64, total as u64);
    }

    fn ended(&self, model: &str) {
        if let Some(bar) = self.models.bars.lock().remove(model) {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_for_each_device() {
        let host = (Device::Cpu, 3 << 30);
        assert_eq!(memory(&[host]), "3.00 GiB");
        assert_eq!(memory(&[host, (Device::Cuda(1), 80 << 30)]), "cpu 3.00 GiB, cuda:1 80.00 GiB");
    }
}
