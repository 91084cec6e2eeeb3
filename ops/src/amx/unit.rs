//! Holds the tiles of a thread, and computes products of up to 32 rows by 64 outputs with them.

/// Rows of inputs that one call multiplies at most.
pub const ROWS_MAX: usize = 32;
/// Outputs of a call.
pub const OUTPUTS: usize = 64;

/// Products: a row for each row of inputs.
pub type Products = [[f32; OUTPUTS]; ROWS_MAX];

#[cfg(not(target_arch = "x86_64"))]
pub use absent::Tiles;
#[cfg(target_arch = "x86_64")]
pub use present::Tiles;

#[cfg(target_arch = "x86_64")]
mod present {
    use super::{OUTPUTS, Products, ROWS_MAX};
    use std::arch::asm;
    use std::cell::Cell;
    use std::marker::PhantomData;

    /// Rows of a tile.
    const ROWS: usize = 16;
    /// Pairs of k in a block, which are the rows of a tile of weights.
    const PAIRS: usize = 16;
    /// 16-bit values of one pair of k over all outputs, and over the 16 of a tile.
    const PAIR: usize = 2 * OUTPUTS;
    const VEC: usize = 2 * 16;
    /// Bytes from one row of a tile of weights, or of products, to the next.
    const WEIGHTS_STRIDE: usize = 2 * PAIR;
    const PRODUCTS_STRIDE: usize = size_of::<f32>() * OUTPUTS;

    thread_local! {
        /// Rows of inputs that the tiles of this thread are configured for; 0 where they are not.
        static CONFIGURED: Cell<usize> = const { Cell::new(0) };
    }

    /// The tiles of this thread. They are released when it is dropped, so that the system need not
    /// save them for a thread that waits.
    pub struct Tiles(PhantomData<*const ()>); // tied to the thread

    /// What LDTILECFG reads.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    const _: () = assert!(size_of::<Config>() == 64);

    impl Config {
        /// Tiles 0 to 3 are products. Up to 16 rows of inputs are tile 4, beside three of weights;
        /// more are tiles 4 and 5, beside two of weights.
        fn of(rows: usize) -> Self {
            let whole = ROWS as u8;
            let mut tiles = [whole; 8];
            if rows <= ROWS {
                tiles[..5].fill(rows as u8);
            } else {
                let rest = (rows - ROWS) as u8;
                (tiles[2], tiles[3], tiles[5]) = (rest, rest, rest);
            }
            let (mut row_bytes, mut all) = ([0; 16], [0; 16]);
            row_bytes[..8].fill(64);
            all[..8].copy_from_slice(&tiles);
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows: all }
        }
    }

    /// The last block of k where it is shorter than the others, filled up with zeros.
    struct Rest {
        weights: [u16; PAIRS * PAIR],
        inputs: [u16; ROWS_MAX * 2 * PAIRS],
    }

    impl Rest {
        /// That of weights (pairs, outputs, 2) and inputs (rows, 2 * pairs).
        fn of(w: &[u16], x: &[u16], pairs: usize) -> Option<Self> {
            let count = pairs % PAIRS;
            if count == 0 {
                return None;
            }
            let mut rest = Self { weights: [0; PAIRS * PAIR], inputs: [0; ROWS_MAX * 2 * PAIRS] };
            rest.weights[..count * PAIR].copy_from_slice(&w[(pairs - count) * PAIR..]);
            let rows = rest.inputs.chunks_exact_mut(2 * PAIRS).zip(x.chunks_exact(2 * pairs));
            rows.for_each(|(to, x)| to[..2 * count].copy_from_slice(&x[2 * (pairs - count)..]));
            Some(rest)
        }
    }

    impl Tiles {
        /// The tiles of this thread.
        ///
        /// # Safety
        /// The CPU must have AMX for bf16, and the system must have granted it to this process.
        pub unsafe fn new() -> Self {
            Self(PhantomData)
        }

        /// `out[row][output] = sum_k w[output][k] x[row][k]` in the order of the canon. `w` holds
        /// bf16 values (pairs of k, outputs, 2), `x` (`rows`, k). Only `rows` rows of `out` are
        /// written.
        pub fn product(&mut self, w: &[u16], x: &[u16], rows: usize, out: &mut Products) {
            let pairs = w.len() / PAIR;
            assert!(w.len() == pairs * PAIR && x.len() == rows * 2 * pairs);
            assert!((1..=ROWS_MAX).contains(&rows));
            self.set_rows(rows);
            let operands = Operands { w, x, pairs, rest: Rest::of(w, x, pairs) };
            // SAFETY: the tiles are this thread's and have `rows` rows of inputs, which `x` has
            // too; `w` has as many pairs.
            unsafe {
                if rows <= ROWS {
                    operands.sum::<false>(0);
                    store_16(out);
                } else {
                    for half in 0..2 {
                        operands.sum::<true>(half * 2 * VEC);
                        store_32(out, half);
                    }
                }
            }
        }

        /// Multiplies what the tiles hold, four times for each of `rounds`: for measuring the most
        /// that they do. That is 4 * 16 * 16 * 32 multiply-adds a round.
        pub fn exercise(&mut self, rounds: usize) {
            self.set_rows(ROWS_MAX);
            for _ in 0..rounds {
                // SAFETY: the tiles are this thread's.
                unsafe {
                    dot::<0, 4, 6>();
                    dot::<1, 4, 7>();
                    dot::<2, 5, 6>();
                    dot::<3, 5, 7>();
                }
            }
        }

        /// Gives the tiles so many rows of inputs; all of them are zero where that changes.
        fn set_rows(&mut self, rows: usize) {
            if CONFIGURED.get() != rows {
                let config = Config::of(rows);
                // SAFETY: a valid configuration of palette 1, by the promise to `new`.
                unsafe {
                    asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags));
                }
                CONFIGURED.set(rows);
            }
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            CONFIGURED.set(0);
            // SAFETY: nobody needs what the tiles hold: each product begins with zeros.
            unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
        }
    }

    /// What is multiplied: weights (pairs, outputs, 2) and inputs (rows, 2 * pairs).
    struct Operands<'a> {
        w: &'a [u16],
        x: &'a [u16],
        pairs: usize,
        rest: Option<Rest>,
    }

    impl Operands<'_> {
        /// Leaves in the tiles the products of up to 16 rows, or of more than 16 with the 32
        /// outputs whose weights begin `first` values later.
        ///
        /// # Safety
        /// The tiles must be configured for the rows of `x`.
        #[inline(always)]
        unsafe fn sum<const WIDE: bool>(&self, first: usize) {
            let stride = size_of::<u16>() * 2 * self.pairs;
            // SAFETY: whole blocks lie within `w` and `x`, the last one within `rest`.
            unsafe {
                zero_products();
                for block in 0..self.pairs / PAIRS {
                    let w = self.w.as_ptr().add(block * PAIRS * PAIR + first);
                    let x = self.x.as_ptr().add(block * 2 * PAIRS);
                    add::<WIDE>(w, x, stride);
                }
                if let Some(rest) = &self.rest {
                    let w = rest.weights.as_ptr().add(first);
                    add::<WIDE>(w, rest.inputs.as_ptr(), size_of::<u16>() * 2 * PAIRS);
                }
            }
        }
    }

    /// Adds one block of k to the products. `stride` is the number of bytes from one row of inputs
    /// to the next.
    ///
    /// # Safety
    /// As for [`load`], of a block of weights and one of inputs.
    #[inline(always)]
    unsafe fn add<const WIDE: bool>(w: *const u16, x: *const u16, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { if WIDE { block_of_32(w, x, stride) } else { block_of_16(w, x, stride) } }
    }

    /// Up to 16 rows with all 64 outputs, whose weights lie together.
    ///
    /// # Safety
    /// As for [`add`].
    #[inline(always)]
    unsafe fn block_of_16(w: *const u16, x: *const u16, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            load::<4>(x, stride);
            load::<5>(w, WEIGHTS_STRIDE);
            dot::<0, 4, 5>();
            load::<6>(w.add(VEC), WEIGHTS_STRIDE);
            dot::<1, 4, 6>();
            load::<7>(w.add(2 * VEC), WEIGHTS_STRIDE);
            dot::<2, 4, 7>();
            load::<5>(w.add(3 * VEC), WEIGHTS_STRIDE);
            dot::<3, 4, 5>();
        }
    }

    /// More than 16 rows with 32 outputs: each tile that is loaded is multiplied twice.
    ///
    /// # Safety
    /// As for [`add`].
    #[inline(always)]
    unsafe fn block_of_32(w: *const u16, x: *const u16, stride: usize) {
        // SAFETY: the caller's promise; a row of inputs has a whole number of 16-bit values.
        unsafe {
            load::<4>(x, stride);
            load::<6>(w, WEIGHTS_STRIDE);
            dot::<0, 4, 6>();
            load::<7>(w.add(VEC), WEIGHTS_STRIDE);
            dot::<1, 4, 7>();
            load::<5>(x.byte_add(ROWS * stride), stride);
            dot::<2, 5, 6>();
            dot::<3, 5, 7>();
        }
    }

    /// Stores the products of up to 16 rows.
    ///
    /// # Safety
    /// The tiles of products must have at most 16 rows.
    unsafe fn store_16(out: &mut Products) {
        let first = out[0].as_mut_ptr();
        // SAFETY: 16 columns of each of 16 rows of `out`, four times.
        unsafe {
            store::<0>(first);
            store::<1>(first.add(16));
            store::<2>(first.add(32));
            store::<3>(first.add(48));
        }
    }

    /// Stores the products of more than 16 rows with the first or the second 32 outputs.
    ///
    /// # Safety
    /// As for [`store_16`], and `half` must be 0 or 1.
    unsafe fn store_32(out: &mut Products, half: usize) {
        let at = |out: &mut Products, row: usize| {
            // SAFETY: the caller's promise; 32 columns follow.
            unsafe { out[row].as_mut_ptr().add(32 * half) }
        };
        // SAFETY: 16 columns of each of 16 rows of `out`, four times.
        unsafe {
            store::<0>(at(out, 0));
            store::<1>(at(out, 0).add(16));
            store::<2>(at(out, ROWS));
            store::<3>(at(out, ROWS).add(16));
        }
    }

    #[inline(always)]
    unsafe fn zero_products() {
        // SAFETY: the caller has configured tiles.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags)
            );
        }
    }

    // The compiler keeps nothing in tiles, so what they hold lasts from one statement to the next.

    /// Loads a tile; its rows are `stride` bytes apart.
    ///
    /// # Safety
    /// The tiles must be configured, and each row of this one must be readable.
    #[inline(always)]
    unsafe fn load<const TILE: u8>(from: *const u16, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tileloadd tmm{tile}, [{from} + {stride}*1]",
                tile = const TILE, from = in(reg) from, stride = in(reg) stride,
                options(nostack, readonly, preserves_flags)
            );
        }
    }

    /// Stores a tile of products.
    ///
    /// # Safety
    /// The tiles must be configured, and each row of this one must be writable.
    #[inline(always)]
    unsafe fn store<const TILE: u8>(to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilestored [{to} + {stride}*1], tmm{tile}",
                tile = const TILE, to = in(reg) to, stride = in(reg) PRODUCTS_STRIDE,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Adds a block: `SUM += INPUTS * WEIGHTS`.
    ///
    /// # Safety
    /// The tiles must be configured.
    #[inline(always)]
    unsafe fn dot<const SUM: u8, const INPUTS: u8, const WEIGHTS: u8>() {
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tdpbf16ps tmm{sum}, tmm{inputs}, tmm{weights}",
                sum = const SUM, inputs = const INPUTS, weights = const WEIGHTS,
                options(nostack, nomem, preserves_flags)
            );
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod absent {
    use super::Products;

    /// The tiles of AMX, which only x86-64 has.
    pub enum Tiles {}

    impl Tiles {
        /// Never returns: there are none.
        ///
        /// # Safety
        /// As on x86-64; no system of this architecture can promise it.
        pub unsafe fn new() -> Self {
            unreachable!("only x86-64 has tiles")
        }

        /// Never called: there is no such value.
        pub fn product(&mut self, _w: &[u16], _x: &[u16], _rows: usize, _out: &mut Products) {
            match *self {}
        }

        /// Never called: there is no such value.
        pub fn exercise(&mut self, _rounds: usize) {
            match *self {}
        }
    }
}
