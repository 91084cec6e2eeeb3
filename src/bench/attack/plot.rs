//! Draws the results: the share of answers that is still missed after a number of chunks, and the
//! share that is detected after a number of tokens. The SVG embeds no fonts.

use super::results::{CHUNKS, Detector, Line, Results, Tokens};
use crate::proof::Scheme;
use plotters::coord::Shift;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use std::ops::Range;

const SIZE: (u32, u32) = (1100, 1240);
const FONT: &str = "sans-serif";

/// A named line.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Axes and words of one panel.
struct Panel<'a> {
    title: &'a str,
    x: Range<f64>,
    x_name: &'a str,
    y_name: &'a str,
    x_label: &'a dyn Fn(&f64) -> String,
    legend: SeriesLabelPosition,
}

/// Draws both panels.
///
/// # Errors
/// When a panel cannot be drawn.
pub fn svg(results: &Results) -> anyhow::Result<String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (upper, lower) = root.split_vertically(SIZE.1 / 2);
        let panel = Panel {
            title: "Weights and prompts: answers that residue-v1 has missed",
            x: 1.0..CHUNKS as f64,
            x_name: "chunks of 32 tokens",
            y_name: "share missed",
            x_label: &|x| format!("{x:.0}"),
            legend: SeriesLabelPosition::UpperRight,
        };
        draw(&upper, &panel, &missed(results))?;
        let curves = seen(results);
        let last = curves.iter().flat_map(|c| &c.points).map(|(x, _)| *x).fold(1.0, f64::max);
        let panel = Panel {
            title: "Sampling: orders of answers in which the margins have spoken",
            x: 0.0..last,
            x_name: "tokens",
            y_name: "share seen",
            x_label: &|x| format!("{:.0}", 10.0_f64.powf(*x)),
            legend: SeriesLabelPosition::LowerRight,
        };
        draw(&lower, &panel, &curves)?;
        root.present()?;
    }
    Ok(text)
}

fn missed(results: &Results) -> Vec<Curve> {
    let lines = results.lines.iter();
    let lines = lines.filter(|l| l.detector == Detector::Energy);
    let curve = |line: &Line| {
        let missed = line.missed.as_ref()?;
        let points = missed.iter().zip(1_u32..).map(|(rate, n)| (f64::from(n), rate.share()));
        Some(Curve { name: line.name.clone(), points: points.collect() })
    };
    lines.filter(|l| l.check == Scheme::Residue.name()).filter_map(curve).collect()
}

/// Over the logarithm of the tokens.
fn seen(results: &Results) -> Vec<Curve> {
    let curve = |tokens: &Tokens| {
        let points = tokens.either.curve.iter().map(|(n, share)| ((*n as f64).log10(), *share));
        Curve { name: tokens.name.clone(), points: points.collect() }
    };
    results.tokens.iter().map(curve).collect()
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    panel: &Panel<'_>,
    curves: &[Curve],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, (FONT, 20))
        .margin(15)
        .x_label_area_size(45)
        .y_label_area_size(55)
        .build_cartesian_2d(panel.x.clone(), -0.02..1.02)?;
    chart
        .configure_mesh()
        .x_desc(panel.x_name)
        .y_desc(panel.y_name)
        .x_label_formatter(panel.x_label)
        .label_style((FONT, 13))
        .draw()?;
    for (number, curve) in curves.iter().enumerate() {
        let style = Palette99::pick(number).stroke_width(2);
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), style).point_size(2))?
            .label(curve.name.as_str())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(panel.legend.clone())
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 12))
        .draw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::{Rate, Stopping};

    #[test]
    fn a_picture_names_every_curve() {
        let line = Line::bare("int8 g32", Detector::Energy, "residue-v1", Rate::new(1, 2));
        let line = Line { missed: Some(vec![Rate::new(1, 2); CHUNKS]), ..line };
        let either = Stopping { curve: vec![(1, 0.1), (100, 1.0)], ..Stopping::default() };
        let tokens = Tokens {
            name: "another <seed>".into(),
            mismatch: Rate::new(1, 2),
            margin: 0.1,
            single: Stopping::default(),
            sequential: Stopping::default(),
            either,
            exact: Stopping::default(),
        };
        let mut results = Results {
            model: "m".into(),
            limits: "l".into(),
            attacked: (2, 256),
            honest: (2, 128),
            lines: vec![line],
            tokens: vec![tokens],
            goals: Vec::new(),
        };
        let svg = svg(&results).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("int8 g32") && svg.contains("another &lt;seed&gt;"), "{svg}");
        (results.lines, results.tokens) = (Vec::new(), Vec::new());
        assert!(super::svg(&results).is_ok());
    }
}
