//! Results: a table for people, JSON for programs, a picture.

use std::fmt::Write as _;
use std::fs;

use anyhow::Result;
use serde::Serialize;

use crate::project;
use crate::report::say;

/// Whether more or less of something is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// More.
    Higher,
    /// Less.
    Lower,
}

/// What we want to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aim {
    /// So many times the peer's figure, or more.
    Times(f64),
    /// This figure, or less.
    AtMost(f64),
}

/// One figure beside a peer's.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The bench that it belongs to.
    pub bench: &'static str,
    /// What was measured.
    pub case: String,
    /// What the figures count.
    pub unit: &'static str,
    /// Our figure.
    pub ours: f64,
    /// The peer's.
    pub peer: Option<f64>,
    /// Who the peer is.
    pub peer_name: String,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
    /// Which is better.
    pub better: Better,
    /// What we want, as text: `>= 2.5 x`, `<= 0.4`.
    pub aim: Option<String>,
    /// Whether that is reached.
    pub met: Option<bool>,
}

impl Row {
    /// A figure of ours beside that of the peer with this name.
    pub fn new(
        bench: &'static str,
        case: String,
        unit: &'static str,
        better: Better,
        ours: f64,
        peer: Option<(f64, &str)>,
    ) -> Self {
        let ratio = peer.map(|(peer, _)| ours / peer).filter(|ratio| ratio.is_finite());
        Self {
            bench,
            case,
            unit,
            ours,
            peer: peer.map(|(peer, _)| peer),
            peer_name: peer.map(|(_, name)| name.to_owned()).unwrap_or_default(),
            ratio,
            better,
            aim: None,
            met: None,
        }
    }

    /// The same with something to reach.
    #[must_use]
    pub fn aim(mut self, aim: Aim) -> Self {
        let (text, met) = match aim {
            Aim::Times(times) => (format!(">= {times} x"), self.ratio.map(|ratio| ratio >= times)),
            Aim::AtMost(most) => (format!("<= {most}"), Some(self.ours <= most)),
        };
        self.aim = Some(text);
        self.met = met;
        self
    }
}

/// Prints the rows and writes them to `target/bench/NAME.json` and `.svg`.
pub fn publish(name: &str, rows: &[Row]) -> Result<()> {
    println!("{}", table(rows));
    let folder = project::target().join("bench");
    fs::create_dir_all(&folder)?;
    let file = folder.join(format!("{name}.json"));
    fs::write(&file, serde_json::to_string_pretty(rows)? + "\n")?;
    let picture = folder.join(format!("{name}.svg"));
    fs::write(&picture, plot(rows))?;
    say(format!("written to {} and {}", file.display(), picture.display()));
    Ok(())
}

/// The rows as a table.
fn table(rows: &[Row]) -> String {
    let mut lines = vec![["case", "unit", "ours", "peer", "ratio", "aim", "met"].map(String::from)];
    for row in rows {
        lines.push([
            row.case.clone(),
            row.unit.to_owned(),
            figure(row.ours),
            row.peer.map(figure).unwrap_or_default(),
            row.ratio.map(|ratio| format!("{ratio:.3}")).unwrap_or_default(),
            row.aim.clone().unwrap_or_default(),
            match row.met {
                Some(true) => "yes".into(),
                Some(false) => "NO".into(),
                None => String::new(),
            },
        ]);
    }
    let widths: [usize; 7] = std::array::from_fn(|column| {
        lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
    });
    let mut text = String::new();
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            // Words to the left, figures to the right.
            let _ = match column {
                0 | 1 | 5 | 6 => write!(text, "{cell:<width$}  "),
                _ => write!(text, "{cell:>width$}  "),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        small if small < 10.0 => format!("{value:.3}"),
        middle if middle < 1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Bars: how many times better we are than the peer, 1 being as good.
fn plot(rows: &[Row]) -> String {
    const LEFT: f64 = 330.0;
    const SCALE: f64 = 420.0;
    const STEP: usize = 24;
    // Only what can be compared; the details of a case are in the table.
    let bars: Vec<(&str, f64)> = rows
        .iter()
        .filter(|row| row.case.matches('/').count() < 2)
        .filter_map(|row| {
            let ratio = row.ratio?;
            let times = if row.better == Better::Higher { ratio } else { 1.0 / ratio };
            (times.is_finite() && times > 0.0).then_some((row.case.as_str(), times))
        })
        .collect();
    let most = bars.iter().map(|bar| bar.1).fold(1.0, f64::max);
    let height = bars.len() * STEP + 40;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"820\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <text x=\"10\" y=\"18\">times better than the peer (the line is 1)</text>\n"
    );
    for (number, (case, times)) in bars.iter().enumerate() {
        let y = 30 + number * STEP;
        let width = times / most * SCALE;
        let color = if *times >= 1.0 { "#3a7d44" } else { "#b03a2e" };
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{case}</text>\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"16\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{times:.2}</text>",
            LEFT - 8.0,
            y + 13,
            LEFT + width + 6.0,
            y + 13,
        );
    }
    let one = LEFT + SCALE / most;
    let _ = writeln!(
        svg,
        "<line x1=\"{one:.1}\" y1=\"26\" x2=\"{one:.1}\" y2=\"{}\" stroke=\"black\" \
         stroke-dasharray=\"3 3\"/>\n</svg>",
        height - 8
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(better: Better, ours: f64, peer: f64) -> Row {
        Row::new("b", "c/d".into(), "u", better, ours, Some((peer, "p")))
    }

    #[test]
    fn aims_are_judged() {
        assert_eq!(row(Better::Higher, 25.0, 10.0).aim(Aim::Times(2.5)).met, Some(true));
        assert_eq!(row(Better::Higher, 24.0, 10.0).aim(Aim::Times(2.5)).met, Some(false));
        assert_eq!(row(Better::Lower, 0.5, 2.0).aim(Aim::AtMost(0.4)).met, Some(false));
        let alone = Row::new("b", "c".into(), "u", Better::Higher, 1.0, None);
        assert_eq!(alone.aim(Aim::Times(2.0)).met, None);
    }

    #[test]
    fn a_bar_shows_how_much_better_less_is() {
        assert!(plot(&[row(Better::Lower, 1.0, 4.0)]).contains(">4.00<"));
        assert!(table(&[row(Better::Lower, 1.0, 4.0)]).contains("0.250"));
    }
}
