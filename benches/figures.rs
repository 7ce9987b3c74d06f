//! Draws what `benches/compare.sh --json FILE` has measured, as the SVG files of the README.
//!
//!     figures throughput.tsv throughput.svg      requests a second over the requests ahead on each connection
//!     figures latency.tsv latency.svg            the time to an answer over the part of the answers that took no longer
//!
//! Which of the two it is shows in the data: the second was measured at a fixed rate.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::env;
use std::fs;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;
use serde_json::Value;

const SIZE: (u32, u32) = (760, 420);
const SERVERS: [(&str, RGBColor); 3] =
    [("kurir", RGBColor(0, 96, 180)), ("redis", RGBColor(200, 60, 40)), ("echo", RGBColor(130, 130, 130))];
/// Percentiles, as the generator names them.
const PERCENTILES: [(&str, f64); 6] =
    [("p50", 50.0), ("p75", 75.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99)];

/// A curve.
type Points = Vec<(f64, f64)>;

/// One measurement: the shape, the server, and what the generator said.
struct Row {
    shape: String,
    server: String,
    report: Value,
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [from, to] = arguments.as_slice() else { panic!("figures DATA.tsv FIGURE.svg") };
    let text = fs::read_to_string(from).unwrap();
    let rows: Vec<Row> = text
        .lines()
        .map(|line| match line.split('\t').collect::<Vec<_>>().as_slice() {
            [shape, _round, server, report] => Row {
                shape: (*shape).to_owned(),
                server: (*server).to_owned(),
                report: serde_json::from_str(report).unwrap(),
            },
            _ => panic!("{line}"),
        })
        .collect();
    let is_at_a_rate = rows.iter().any(|row| row.report["rate"].as_u64().is_some_and(|rate| rate > 0));
    if is_at_a_rate { latency(&rows, to) } else { throughput(&rows, to) }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median of what `value` takes from the reports of one server, for each of the numbers that `key` gives a row.
fn curve(rows: &[Row], server: &str, key: impl Fn(&Row) -> u64, value: impl Fn(&Value) -> f64) -> Points {
    let mut by_key: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.server == server) {
        by_key.entry(key(row)).or_default().push(value(&row.report));
    }
    by_key.into_iter().map(|(key, values)| (key as f64, median(values))).collect()
}

fn throughput(rows: &[Row], to: &str) {
    let ahead = |row: &Row| row.shape.split_once('x').unwrap().1.parse().unwrap();
    let curves = SERVERS.map(|(server, _)| {
        curve(rows, server, ahead, |report| report["requests_per_second"].as_f64().unwrap() / 1000.0)
    });
    let last = curves[0].iter().map(|(x, _)| *x).fold(1.0, f64::max);
    let labels = Labels {
        title: "Requests a second, 50 connections",
        x: "requests ahead on each connection",
        y: "thousand requests a second",
        x_of: |x| format!("{x:.0}"),
    };
    draw(to, &labels, (1.0..last).log_scale(), &curves);
}

fn latency(rows: &[Row], to: &str) {
    let curves = SERVERS.map(|(server, _)| {
        let point = |(name, percent): (&str, f64)| {
            let of_rows = curve(rows, server, |_| 0, |report| report["latency_us"][name].as_f64().unwrap() / 1000.0);
            (1.0 / (1.0 - percent / 100.0), of_rows[0].1)
        };
        PERCENTILES.map(point).to_vec()
    });
    let rate = rows[0].report["rate"].as_u64().unwrap();
    let title =
        format!("Time to the answer at {rate} requests a second, {} connections", rows[0].report["connections"]);
    let labels = Labels {
        title: &title,
        x: "percentile",
        y: "milliseconds",
        x_of: |x| format!("{:.5}", 100.0 - 100.0 / x).trim_end_matches('0').trim_end_matches('.').to_owned() + "%",
    };
    draw(to, &labels, (2.0..10_000.0).log_scale(), &curves);
}

struct Labels<'s> {
    title: &'s str,
    x: &'s str,
    y: &'s str,
    x_of: fn(f64) -> String,
}

/// Draws curves over axes that are both logarithmic.
fn draw<X>(to: &str, labels: &Labels<'_>, x: X, curves: &[Points])
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let values = || curves.iter().flatten().map(|(_, y)| *y);
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    let area = SVGBackend::new(to, SIZE).into_drawing_area();
    area.fill(&WHITE).unwrap();
    let mut chart = ChartBuilder::on(&area)
        .caption(labels.title, ("sans-serif", 18))
        .margin(12)
        .margin_right(32)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(x, (least / 1.5..most * 1.5).log_scale())
        .unwrap();
    let x_of = labels.x_of;
    chart
        .configure_mesh()
        .x_desc(labels.x)
        .y_desc(labels.y)
        .x_label_formatter(&|x| x_of(*x))
        .y_label_formatter(&|y| format!("{y}"))
        .light_line_style(TRANSPARENT)
        .draw()
        .unwrap();
    for ((server, colour), points) in SERVERS.into_iter().zip(curves) {
        let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
        chart
            .draw_series(line)
            .unwrap()
            .label(server)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        let dots = points.iter().map(|point| Circle::new(*point, 3, colour.filled()));
        chart.draw_series(dots).unwrap();
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .unwrap();
    area.present().unwrap();
}
