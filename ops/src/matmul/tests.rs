use super::super::dtype::BF16_FLUSH;
use super::super::lanes::Isa;
use super::super::pool::Pool;
use super::super::product::BLOCK_K;
use super::*;

fn random(state: &mut u32) -> u32 {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    *state
}

fn values(count: usize, seed: u32, scale: f32) -> Vec<f32> {
    let mut state = seed;
    (0..count).map(|_| (random(&mut state) as f32 / u32::MAX as f32 - 0.5) * scale).collect()
}

fn pack(turn: &Turn<'_>, (rows, cols): (usize, usize), dtype: Dtype, bits: &[u16]) -> Packed {
    let w = Packed::pack::<std::io::Error>(turn, (rows, cols), dtype, |r, out| {
        out.copy_from_slice(&bits[r * cols..][..cols]);
        Ok(())
    });
    w.unwrap()
}

fn packed(turn: &Turn<'_>, rows: usize, cols: usize, dtype: Dtype) -> (Packed, Vec<u16>) {
    let bits: Vec<u16> = values(rows * cols, 7, 2.0).into_iter().map(|x| dtype.round(x)).collect();
    (pack(turn, (rows, cols), dtype, &bits), bits)
}

/// A rule for the additions of one output, over elements of w and x.
type Order = fn(&[f32], &[f32]) -> f32;

/// Two chains over each block of `len`, from +0.
fn blocks(w: &[f32], x: &[f32], len: usize) -> impl Iterator<Item = (f32, f32)> {
    w.chunks(len).zip(x.chunks(len)).map(move |(w, x)| {
        let (mut chains, zero) = ([0.0_f32; 2], 0.0);
        for k in 0..len {
            let (w, x) = (w.get(k).unwrap_or(&zero), x.get(k).unwrap_or(&zero));
            chains[k % 2] = w.mul_add(*x, chains[k % 2]);
        }
        (chains[0], chains[1])
    })
}

/// The canon, word for word.
fn canon(w: &[f32], x: &[f32]) -> f32 {
    blocks(w, x, BLOCK_K).fold(0.0, |sum, (even, odd)| sum + (even + odd))
}

/// The canon on hardware that flushes subnormal results of every step.
fn canon_flushing(w: &[f32], x: &[f32]) -> f32 {
    let flush = |x: f32| if x.is_subnormal() { 0.0_f32.copysign(x) } else { x };
    let mut sum = 0.0;
    for (w, x) in w.chunks(BLOCK_K).zip(x.chunks(BLOCK_K)) {
        let mut chains = [0.0_f32; 2];
        for (k, (w, x)) in w.iter().zip(x).enumerate() {
            chains[k % 2] = flush(w.mul_add(*x, chains[k % 2]));
        }
        sum = flush(sum + flush(chains[0] + chains[1]));
    }
    sum
}

/// The canon with chains that begin with their first product.
fn canon_from_products(w: &[f32], x: &[f32]) -> f32 {
    let mut sum = 0.0;
    for (w, x) in w.chunks(BLOCK_K).zip(x.chunks(BLOCK_K)) {
        let mut chains = [w[0] * x[0], w[1] * x[1]];
        for k in 2..w.len() {
            chains[k % 2] = w[k].mul_add(x[k], chains[k % 2]);
        }
        sum += chains[0] + chains[1];
    }
    sum
}

/// Other orders that someone might use.
const OTHERS: [(&str, Order); 5] = [
    ("one accumulator, odd then even (VDPBF16PS on pairs as they lie)", |w, x| {
        (0..w.len()).fold(0.0, |sum, k| w[k ^ 1].mul_add(x[k ^ 1], sum))
    }),
    ("one accumulator, ascending", |w, x| {
        w.iter().zip(x).fold(0.0, |sum, (w, x)| w.mul_add(*x, sum))
    }),
    ("blocks of 64", |w, x| blocks(w, x, 64).fold(0.0, |sum, (e, o)| sum + (e + o))),
    ("blocks of 16", |w, x| blocks(w, x, 16).fold(0.0, |sum, (e, o)| sum + (e + o))),
    ("chains added one by one", |w, x| {
        blocks(w, x, BLOCK_K).fold(0.0, |sum, (e, o)| (sum + e) + o)
    }),
];

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Calls `check(place, w, x, product)` for every output on every instruction set.
fn for_each_product(
    (rows, cols, tokens): (usize, usize, usize),
    dtype: Dtype,
    weights: &[u16],
    inputs: &[f32],
    mut check: impl FnMut(&str, &[f32], &[f32], f32),
) {
    for isa in Isa::available_and_emulated() {
        let pool = Pool::new(2, isa).unwrap();
        let turn = pool.turn();
        let w = pack(&turn, (rows, cols), dtype, weights);
        let mut x = Rounded::new(dtype, cols);
        x.set_rows(tokens);
        (0..tokens).for_each(|t| x.set_row(t, &inputs[t * cols..][..cols]));
        let mut out = vec![f32::NAN; rows * tokens];
        matmul_into(&turn, &w, &x, &mut out);
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            w.row_into(r, &mut row);
            for t in 0..tokens {
                let place = format!("{isa} {dtype} {rows} x {cols}, row {r}, token {t}");
                check(&place, &row, &x.widened(t), out[t * rows + r]);
            }
        }
    }
}

/// Rows, columns and tokens: whole blocks of k and others, and one or two tiles of tokens, full and
/// not.
const SHAPES: [(usize, usize, usize); 11] = [
    (1, 2, 1),
    (64, 64, 1),
    (130, 34, 13),
    (192, 96, 64),
    (65, 30, 2),
    (3, 62, 5),
    (129, 158, 7),
    (64, 128, 16),
    (70, 64, 17),
    (100, 98, 32),
    (128, 40, 49),
];

#[test]
fn products_follow_the_canon_on_every_instruction_set_and_shape() {
    for shape in SHAPES {
        let (rows, cols, tokens) = shape;
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let weights = values(rows * cols, 7, 2.0).into_iter().map(|x| dtype.round(x));
            let (weights, inputs) = (weights.collect::<Vec<_>>(), values(tokens * cols, 99, 8.0));
            for_each_product(shape, dtype, &weights, &inputs, |place, w, x, got| {
                assert_eq!(got.to_bits(), canon(w, x).to_bits(), "{place}");
            });
        }
    }
}

/// The control of the test above: its data tells orders apart.
#[test]
fn other_orders_give_other_bits() {
    let (rows, cols, tokens) = (192, 96, 64);
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let round = |x: Vec<f32>| x.into_iter().map(|x| dtype.widen(dtype.round(x)));
        let w: Vec<f32> = round(values(rows * cols, 7, 2.0)).collect();
        let x: Vec<f32> = round(values(tokens * cols, 99, 8.0)).collect();
        for (name, order) in OTHERS {
            let differs = w.chunks(cols).flat_map(|w| x.chunks(cols).map(move |x| (w, x)));
            let differs = differs.filter(|(w, x)| order(w, x) != canon(w, x)).count();
            assert!(differs > rows * tokens / 20, "{name}, {dtype}: only {differs} differ");
        }
    }
}

/// bf16 values at every edge: zeros, infinities, NaN, the largest and the smallest.
fn edges() -> Vec<f32> {
    let widen = |bits: u32| f32::from_bits(bits << 16);
    let next = f32::from_bits(BF16_FLUSH.to_bits() + (1 << 16));
    let positive = [
        0.0,
        f32::INFINITY,
        widen(0x7f7f), // the largest
        BF16_FLUSH,
        next,
        widen(0x0001), // a subnormal, which counts as zero
        1.0,
        1.5,
    ];
    positive.iter().flat_map(|x| [*x, -x]).chain([f32::NAN]).collect()
}

fn picks(from: &[f32], count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..count).map(|_| from[(random(&mut state) >> 16) as usize % from.len()]).collect()
}

#[test]
fn extremes_follow_the_canon_too() {
    let finite: Vec<f32> = edges().into_iter().filter(|x| x.is_finite()).collect();
    let zeros = [0.0, -0.0, 0.0, -0.0, -1.0];
    let mixes = [edges(), finite, zeros.to_vec()];
    for shape in SHAPES {
        let (rows, cols, tokens) = shape;
        for (seed, mix) in (1..).zip(&mixes) {
            let weights = picks(mix, rows * cols, seed);
            let weights: Vec<u16> =
                weights.into_iter().map(|x| half::bf16::from_f32(x).to_bits()).collect();
            let inputs = picks(mix, tokens * cols, seed + 40);
            for_each_product(shape, Dtype::Bf16, &weights, &inputs, |place, w, x, got| {
                let want = canon(w, x);
                assert!(same(got, want), "{place}: {got:e}, not {want:e}");
                assert!(same(canon_flushing(w, x), want), "{place}: a subnormal sum");
                assert!(same(canon_from_products(w, x), want), "{place}: the start shows");
                assert!(got != 0.0 || got.is_sign_positive(), "{place}: a negative zero");
            });
        }
    }
}

#[test]
fn no_sum_is_subnormal_because_tiny_magnitudes_are_flushed() {
    let (rows, cols, tokens) = (64, 158, 6);
    // From the smallest that is kept up to a few hundred times that, with all eight bits.
    let mut state = 3;
    let mut tiny = |count: usize| -> Vec<f32> {
        let mut draw = || {
            let bits = random(&mut state) >> 8;
            let magnitude = BF16_FLUSH.to_bits() + ((bits & 0x3ff) << 16);
            f32::from_bits(magnitude | (bits << 31))
        };
        (0..count).map(|_| draw()).collect()
    };
    let (w, x) = (tiny(rows * cols), tiny(tokens * cols));
    let bits: Vec<u16> = w.iter().map(|x| Dtype::Bf16.round(*x)).collect();
    for_each_product((rows, cols, tokens), Dtype::Bf16, &bits, &x, |place, w, x, got| {
        assert!(w.iter().chain(x).all(|x| x.abs() >= BF16_FLUSH), "{place}");
        assert_eq!(got.to_bits(), canon(w, x).to_bits(), "{place}");
        assert_eq!(got.to_bits(), canon_flushing(w, x).to_bits(), "{place}");
    });
    // The control: a few powers below the limit, flushing shows.
    let smaller = |x: &[f32]| x.iter().map(|x| x * 2.0_f32.powi(-14)).collect::<Vec<f32>>();
    let (w, x) = (smaller(&w), smaller(&x));
    let shows = w.chunks(cols).flat_map(|w| x.chunks(cols).map(move |x| (w, x)));
    let shows = shows.filter(|(w, x)| canon(w, x) != canon_flushing(w, x)).count();
    assert!(shows > 0, "the data would not show a subnormal");
}

#[test]
fn weights_that_lie_for_another_instruction_set_are_refused() {
    let sets = Isa::available_and_emulated();
    for (of, isa) in sets.iter().flat_map(|of| sets.iter().map(move |isa| (*of, *isa))) {
        let (packer, pool) = (Pool::new(1, of).unwrap(), Pool::new(1, isa).unwrap());
        let (w, _) = packed(&packer.turn(), 64, 32, Dtype::Bf16);
        let mut x = Rounded::new(Dtype::Bf16, 32);
        x.set_rows(1);
        let mut out = [0.0; 64];
        let multiply = || matmul_into(&pool.turn(), &w, &x, &mut out);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(multiply));
        assert_eq!(done.is_ok(), of.has_tiles() == isa.has_tiles(), "{of} for {isa}");
    }
}

#[test]
fn rows_come_back_out_of_the_packed_layout() {
    let pool = Pool::new(1, Isa::SCALAR).unwrap();
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let (w, bits) = packed(&pool.turn(), 70, 6, dtype);
        let mut row = [0.0; 6];
        for r in 0..70 {
            w.row_into(r, &mut row);
            let want: Vec<f32> = bits[r * 6..][..6].iter().map(|b| dtype.widen(*b)).collect();
            assert_eq!(row.as_slice(), want, "{dtype} row {r}");
        }
    }
}

#[test]
fn gated_rows_alternate_in_blocks() {
    assert_eq!(gated_rows(65), 256);
    assert_eq!(gated_row(0, 65), Some(Ok(0)));
    assert_eq!(gated_row(64, 65), Some(Err(0)));
    assert_eq!(gated_row(128, 65), Some(Ok(64)));
    assert_eq!(gated_row(192, 65), Some(Err(64)));
    assert_eq!(gated_row(129, 65), None);
}
