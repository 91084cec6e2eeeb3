//! Draws the plots of a report as SVG without embedded fonts.

use super::schema::{BenchReport, LoadLevel, Phase, ReportRow};
use super::spread::Quantiles;
use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::{
    BLACK, BLUE, ChartBuilder, Circle, Color, DrawingArea, DrawingAreaErrorKind, IntoDrawingArea,
    IntoFont, LineSeries, MAGENTA, PathElement, RED, RGBColor, SVGBackend, Text, WHITE,
};
use std::ops::Range;

/// Pixels of a plot.
const SIZE: (u32, u32) = (760, 380);
/// Of its width, those of the chart; the names of the series stand beside it.
const CHART_WIDTH: u32 = 580;
/// Pixels from one name to the next.
const NAME_HEIGHT: i32 = 18;
const COLORS: [RGBColor; 6] =
    [BLUE, RED, RGBColor(0, 140, 60), MAGENTA, RGBColor(200, 120, 0), BLACK];
/// Steps of an axis have these first digits.
const STEPS: [f64; 3] = [1.0, 2.0, 5.0];
/// Numbers on an axis, at most.
const TICKS_MAX: usize = 9;

/// How an axis is scaled.
#[derive(Clone, Copy, PartialEq)]
enum Scale {
    Linear,
    /// Values above zero, by their decimal logarithm.
    Log,
}

struct Axis {
    name: &'static str,
    scale: Scale,
}

struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    is_line: bool,
}

struct Chart {
    title: String,
    x: Axis,
    y: Axis,
    series: Vec<Series>,
}

/// All plots that a report has data for: what they show, and the SVG.
///
/// # Errors
/// When one cannot be drawn.
pub(super) fn all(report: &BenchReport) -> anyhow::Result<Vec<(String, String)>> {
    let mut charts = Vec::new();
    charts.extend(roofline(report));
    charts.extend(speeds(report));
    charts.extend(latency(&report.levels));
    charts.extend(distribution(&report.levels, "Time to the first token", |l| &l.first_token));
    charts.extend(distribution(&report.levels, "Gaps between chunks", |l| &l.gap));
    charts.extend(memory(report));
    charts.iter().map(|chart| Ok((chart.title.clone(), chart.svg()?))).collect()
}

/// Operations a byte across, operations a second up, under the two ceilings.
fn roofline(report: &BenchReport) -> Option<Chart> {
    let ceilings = report.ceilings.as_ref().filter(|_| !report.rows.is_empty())?;
    let ratio = |row: &ReportRow| row.operations_per_second / row.bytes_per_second;
    let ratios: Vec<f64> = report.rows.iter().map(ratio).collect();
    let ridge = ceilings.fma_peak / ceilings.read_bandwidth;
    let low = ratios.iter().copied().fold(ridge, f64::min) / 2.0;
    let high = ratios.iter().copied().fold(ridge, f64::max) * 2.0;
    let roof = |x: f64| (x * ceilings.read_bandwidth).min(ceilings.fma_peak) / 1e9;
    let line = |name: &str, points| Series { name: name.into(), points, is_line: true };
    let points = [low, ridge, high].map(|x| (x, roof(x))).to_vec();
    let mut series = vec![line("measured ceilings", points)];
    if let Some(table) = &ceilings.table {
        let roof = |x: f64| (x * table.bandwidth).min(table.peak) / 1e9;
        let ridge = table.peak / table.bandwidth;
        let points = [low, ridge.clamp(low, high), high].map(|x| (x, roof(x))).to_vec();
        series.push(line("datasheet", points));
    }
    for phase in [Phase::Prefill, Phase::Decode, Phase::Verify] {
        let rows = report.rows.iter().filter(|row| row.phase == phase);
        let points = rows.map(|row| (ratio(row), row.operations_per_second / 1e9)).collect();
        series.push(Series { name: phase.name().into(), points, is_line: false });
    }
    Some(Chart {
        title: "Roofline".into(),
        x: Axis { name: "operations a byte", scale: Scale::Log },
        y: Axis { name: "GFLOP/s", scale: Scale::Log },
        series,
    })
}

/// Decode speed over the batch, a line for each depth.
fn speeds(report: &BenchReport) -> Option<Chart> {
    let rows = || report.rows.iter().filter(|row| row.phase == Phase::Decode);
    let mut depths: Vec<usize> = rows().map(|row| row.depth).collect();
    depths.sort_unstable();
    depths.dedup();
    let of = |depth: usize| Series {
        name: format!("depth {depth}"),
        points: rows()
            .filter(|row| row.depth == depth)
            .map(|row| (row.batch as f64, row.speed.mean))
            .collect(),
        is_line: true,
    };
    (!depths.is_empty()).then(|| Chart {
        title: "Decode".into(),
        x: Axis { name: "sequences side by side", scale: Scale::Log },
        y: Axis { name: "tokens a second", scale: Scale::Linear },
        series: depths.into_iter().map(of).collect(),
    })
}

/// Throughput over latency, with the line of those levels that no other beats in both.
fn latency(levels: &[LoadLevel]) -> Option<Chart> {
    let point = |level: &LoadLevel| {
        let latency = level.per_token.as_ref()?.p50;
        let points = vec![(1e3 * latency, level.steady_tokens_per_second)];
        Some(Series { name: level.load(), points, is_line: false })
    };
    let mut series: Vec<Series> = levels.iter().filter_map(point).collect();
    let points: Vec<(f64, f64)> = series.iter().flat_map(|s| s.points.iter().copied()).collect();
    // A line needs two points.
    let line = pareto(&points);
    if line.len() > 1 {
        series.push(Series { name: "Pareto line".into(), points: line, is_line: true });
    }
    (!points.is_empty()).then(|| Chart {
        title: "Throughput against latency".into(),
        x: Axis { name: "median milliseconds a token", scale: Scale::Linear },
        y: Axis { name: "tokens a second", scale: Scale::Linear },
        series,
    })
}

/// The points that have more throughput than every one of lower latency, by latency.
fn pareto(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
    let mut best = f64::NEG_INFINITY;
    sorted.retain(|(_, y)| {
        let is_better = *y > best;
        best = best.max(*y);
        is_better
    });
    sorted
}

/// Shares of all values that lie below, a line for each level.
fn distribution(
    levels: &[LoadLevel],
    title: &str,
    of: impl Fn(&LoadLevel) -> &Option<Quantiles>,
) -> Option<Chart> {
    let line = |level: &LoadLevel| {
        let curve = &of(level).as_ref()?.curve;
        let last = curve.len().saturating_sub(1).max(1) as f64;
        let points = curve.iter().enumerate();
        let points = points.map(|(i, v)| (1e3 * v.max(1e-6), 100.0 * i as f64 / last));
        Some(Series { name: level.load(), points: points.collect(), is_line: true })
    };
    let series: Vec<Series> = levels.iter().filter_map(line).collect();
    (!series.is_empty()).then(|| Chart {
        title: title.into(),
        x: Axis { name: "milliseconds", scale: Scale::Log },
        y: Axis { name: "percent below", scale: Scale::Linear },
        series,
    })
}

/// What memory holds, one on top of the other, beside what was resident.
fn memory(report: &BenchReport) -> Option<Chart> {
    let memory = report.memory?;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let bar = |name: &str, place: f64, bytes: u64| Series {
        name: format!("{name}, {:.2} GiB", gib(bytes)),
        points: vec![(place, 0.0), (place, gib(bytes))],
        is_line: true,
    };
    Some(Chart {
        title: "Memory".into(),
        x: Axis { name: "", scale: Scale::Linear },
        y: Axis { name: "GiB", scale: Scale::Linear },
        series: vec![
            bar("weights", 1.0, memory.weights),
            bar("keys and values", 2.0, memory.kv),
            bar("resident at most", 3.0, memory.peak_resident),
        ],
    })
}

/// An axis in a chart, with the places that get a number.
struct Places {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Places {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (place - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl Axis {
    fn places(&self, values: impl Iterator<Item = f64> + Clone) -> Places {
        let range = self.range(values);
        Places { ticks: self.ticks(&range), range }
    }

    fn place(&self, value: f64) -> Option<f64> {
        let placed = match self.scale {
            Scale::Linear => value,
            Scale::Log => value.log10(),
        };
        placed.is_finite().then_some(placed)
    }

    fn label(&self, place: f64) -> String {
        let value = match self.scale {
            Scale::Linear => place,
            Scale::Log => 10_f64.powf(place),
        };
        match value.abs() {
            // Places are sums of logarithms: what is almost a round number is one.
            v if v >= 1e-3 || v == 0.0 => format!("{}", (1e4 * value).round() / 1e4),
            _ => format!("{value:.0e}"),
        }
    }

    /// Places of round numbers within a range.
    fn ticks(&self, range: &Range<f64>) -> Vec<f64> {
        if self.scale == Scale::Linear {
            let width = range.end - range.start;
            let decade = 10_f64.powf((width / TICKS_MAX as f64).log10().floor());
            let steps = STEPS.iter().map(|digit| digit * decade);
            let step = steps.chain([10.0 * decade]).find(|step| width / step <= TICKS_MAX as f64);
            let step = step.unwrap_or(width);
            let (first, last) = ((range.start / step).ceil(), (range.end / step).floor());
            return (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect();
        }
        let decades = range.start.floor() as i32..=range.end.floor() as i32;
        let all = |digits: &[f64]| -> Vec<f64> {
            let of = |decade: i32| digits.iter().map(move |d| f64::from(decade) + d.log10());
            decades.clone().flat_map(of).filter(|place| range.contains(place)).collect()
        };
        let fine = all(&STEPS);
        if fine.len() > TICKS_MAX { all(&STEPS[..1]) } else { fine }
    }

    fn range(&self, values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        let low = if self.scale == Scale::Linear { low.min(0.0) } else { low };
        let margin = (0.06 * (high - low)).max(1e-3);
        let start = if self.scale == Scale::Linear && low == 0.0 { 0.0 } else { low - margin };
        start..high + margin
    }
}

impl Chart {
    fn svg(&self) -> anyhow::Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| anyhow!("the plot `{}`: {e}", self.title))?;
        Ok(svg)
    }

    fn placed(&self, series: &Series) -> Vec<(f64, f64)> {
        let place = |(x, y): &(f64, f64)| Some((self.x.place(*x)?, self.y.place(*y)?));
        series.points.iter().filter_map(place).collect()
    }

    /// The names of all series that have points, with their colors.
    fn draw_names<'a>(
        &self,
        placed: &[Vec<(f64, f64)>],
        area: &DrawingArea<SVGBackend<'a>, Shift>,
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let named = self.series.iter().zip(placed).enumerate().filter(|(_, (_, p))| !p.is_empty());
        for (line, (index, (series, _))) in named.enumerate() {
            let (y, color) = (20 + NAME_HEIGHT * line as i32, COLORS[index % COLORS.len()]);
            area.draw(&PathElement::new([(0, y), (14, y)], color.stroke_width(3)))?;
            area.draw(&Text::new(
                series.name.clone(),
                (20, y - 6),
                ("sans-serif", 12).into_font(),
            ))?;
        }
        Ok(())
    }

    fn draw(&self, svg: &mut String) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let placed: Vec<Vec<(f64, f64)>> = self.series.iter().map(|s| self.placed(s)).collect();
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let points = || placed.iter().flatten();
        if points().next().is_none() {
            return area.present();
        }
        let (x, y) = (self.x.places(points().map(|p| p.0)), self.y.places(points().map(|p| p.1)));
        let (left, right) = area.split_horizontally(CHART_WIDTH);
        self.draw_names(&placed, &right)?;
        let mut chart = ChartBuilder::on(&left)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .x_desc(self.x.name)
            .y_desc(self.y.name)
            .x_label_formatter(&|place| self.x.label(*place))
            .y_label_formatter(&|place| self.y.label(*place))
            .draw()?;
        for (index, (series, points)) in self.series.iter().zip(&placed).enumerate() {
            let color = COLORS[index % COLORS.len()];
            match series.is_line {
                true => chart
                    .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?,
                false => {
                    chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, color.filled())))?
                }
            };
        }
        area.present()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::seal::tests::sample;

    #[test]
    fn a_report_of_an_engine_has_a_roofline_speeds_and_memory() {
        let plots = all(&sample(10.0)).unwrap();
        let titles: Vec<&str> = plots.iter().map(|(title, _)| title.as_str()).collect();
        assert_eq!(titles, ["Roofline", "Decode", "Memory"]);
        assert!(plots.iter().all(|(_, svg)| svg.starts_with("<svg") && svg.contains("polyline")));
        assert_eq!(plots[0].1.matches("<circle").count(), 3, "{}", plots[0].1);
    }

    #[test]
    fn axes_have_round_numbers() {
        let shown = |scale, range: Range<f64>| {
            let axis = Axis { name: "", scale };
            let labels: Vec<String> = axis.ticks(&range).iter().map(|t| axis.label(*t)).collect();
            labels.join(" ")
        };
        assert_eq!(shown(Scale::Linear, 0.0..1.47), "0 0.2 0.4 0.6 0.8 1 1.2 1.4");
        assert_eq!(shown(Scale::Linear, -30.0..1190.0), "0 200 400 600 800 1000");
        assert_eq!(shown(Scale::Log, 2.95..4.7), "1000 2000 5000 10000 20000 50000");
        assert_eq!(shown(Scale::Log, -4.1..2.9), "1e-4 0.001 0.01 0.1 1 10 100");
    }

    #[test]
    fn the_pareto_line_leaves_out_what_is_beaten() {
        let points = [(20.0, 300.0), (10.0, 100.0), (15.0, 90.0), (30.0, 299.0), (10.0, 50.0)];
        assert_eq!(pareto(&points), [(10.0, 100.0), (20.0, 300.0)]);
    }
}
