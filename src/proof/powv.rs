//! Computes Targon's proof-of-weights value, version 2 (protocol section 3): one element of one
//! parameter, chosen by sums of token ids, times their sum.
//!
//! It shows that the prover holds the weights and names the ids; it says nothing about what was
//! computed. Kept because validators of 4.0 and 4.1 ask for it.

/// Shape of a parameter, in the order in which the model lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PowvShape {
    /// Rows; one where the parameter is a vector.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// The element that a pair of sums selects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Element {
    /// Index into the shapes.
    pub parameter: usize,
    /// The row of the element in its parameter.
    pub row: usize,
    /// The column of the element in its parameter.
    pub col: usize,
}

/// Which element belongs to the sum of the prompt's ids and the sum of the output's ids before the
/// current token. Empty parameters are skipped; `None` when there is nothing else.
pub fn select(shapes: &[PowvShape], input_sum: u64, output_sum: u64) -> Option<Element> {
    let count = shapes.len() as u64;
    if count == 0 {
        return None;
    }
    let first = (input_sum + output_sum) % count;
    (0..count).find_map(|step| {
        let parameter = ((first + step) % count) as usize;
        let PowvShape { rows, cols } = shapes[parameter];
        (rows > 0 && cols > 0).then(|| Element {
            parameter,
            row: (output_sum % rows as u64) as usize,
            col: (input_sum % cols as u64) as usize,
        })
    })
}

/// `floor(weight * (input_sum + output_sum))` in f64.
pub fn value(weight: f32, input_sum: u64, output_sum: u64) -> i64 {
    (f64::from(weight) * (input_sum + output_sum) as f64).floor() as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// The test vector of the protocol, section 3.6.
    #[test]
    fn the_published_vector() {
        let shapes = [
            PowvShape { rows: 6, cols: 4 },
            PowvShape { rows: 8, cols: 4 },
            PowvShape { rows: 1, cols: 4 },
        ];
        let weight = |e: Element| {
            let (r, c) = (e.row as i32, e.col as i32);
            let x = match e.parameter {
                0 => f64::from((7 * r + 3 * c) % 11 - 5) / 10.0,
                1 => f64::from((5 * r + 2 * c) % 13 - 6) / 20.0,
                _ => 1.0 + f64::from(c) / 10.0,
            };
            bf16::from_f64(x).to_f32()
        };
        let input = 128_000 + 15 + 27;
        let mut output = 0;
        let mut values = Vec::new();
        for next in [9, 4, 300, 77, 0] {
            let element = select(&shapes, input, output).unwrap();
            values.push(value(weight(element), input, output));
            output += next;
        }
        assert_eq!(values, [154_050, 154_061, -38_517, -38_607, 154_519]);
    }

    #[test]
    fn empty_parameters_are_skipped() {
        let shapes = [PowvShape { rows: 0, cols: 4 }, PowvShape { rows: 2, cols: 3 }];
        assert_eq!(select(&shapes, 4, 0), Some(Element { parameter: 1, row: 0, col: 1 }));
        assert_eq!(select(&shapes[..1], 4, 0), None);
        assert_eq!(select(&[], 4, 0), None);
    }
}
