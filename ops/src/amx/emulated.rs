//! Computes the tile instructions in software where a test's CPU refuses them, as Intel's manual
//! describes them: an instruction that ends in SIGILL is decoded and done by the handler.
//!
//! So tests of tiles run on every x86-64 CPU, and those of what uses them where there is AVX-512.
//! What a CPU does is measured on a CPU: [`support`](super::support) tries it.

use std::cell::UnsafeCell;
use std::sync::Once;

/// What the tiles of a thread hold.
struct State {
    data: [[[u8; 64]; 16]; 8],
    rows: [u8; 8],
    row_bytes: [u16; 8],
}

thread_local! {
    static STATE: UnsafeCell<State> = const { UnsafeCell::new(State::RELEASED) };
}

/// From now on, tile instructions of this process are computed here where the CPU refuses them.
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero `sigaction` is valid; the handler takes what SA_SIGINFO promises.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
    });
}

/// The handler of SIGILL. What it does not know ends the process as without it.
extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system gives a handler with SA_SIGINFO the thread's context; the instruction that
    // was refused can be read. The thread was at that instruction, so it does not use `STATE`.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let code = registers[libc::REG_RIP as usize] as *const u8;
        let done = Instruction::decode(code, registers).and_then(|(instruction, len)| {
            STATE.with(|s| (*s.get()).run(&instruction).map(|()| len))
        });
        match done {
            Some(len) => registers[libc::REG_RIP as usize] += len as i64,
            None => drop(libc::signal(libc::SIGILL, libc::SIG_DFL)),
        }
    }
}

enum Instruction {
    Configure { from: usize },
    Release,
    Zero { tile: usize },
    Load { tile: usize, from: usize, stride: usize },
    Store { tile: usize, to: usize, stride: usize },
    Dot { sum: usize, left: usize, right: usize },
}

/// Where an operand lies: what is added once, and the index that rows are multiplied by.
struct Place {
    base: usize,
    index: usize,
    len: usize,
}

impl Instruction {
    /// The instruction at `code`, with its length; `None` where it is no tile instruction.
    ///
    /// # Safety
    /// `code` must be readable for an instruction's length.
    unsafe fn decode(code: *const u8, registers: &[i64; 23]) -> Option<(Self, usize)> {
        // SAFETY: the caller's promise.
        let byte = |i: usize| unsafe { *code.add(i) };
        // VEX of three bytes, map 0F38, W0, 128 bits.
        if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
            return None;
        }
        let (prefix, vvvv) = (byte(2) & 3, usize::from(!(byte(2) >> 3) & 15));
        let (mode, reg, rm) = (byte(4) >> 6, usize::from(byte(4) >> 3 & 7), byte(4) & 7);
        let in_memory = || {
            // SAFETY: as above.
            unsafe { Place::decode(code, registers) }
        };
        Some(match (byte(3), prefix, mode) {
            (0x49, 0, 3) if reg == 0 && rm == 0 => (Self::Release, 5),
            (0x49, 0, _) if reg == 0 && mode < 3 => {
                let Place { base, index, len } = in_memory()?;
                (Self::Configure { from: base + index }, len)
            }
            (0x49, 3, 3) if rm == 0 => (Self::Zero { tile: reg }, 5),
            (0x4b, 3, _) if mode < 3 && rm == 4 => {
                let Place { base, index, len } = in_memory()?;
                (Self::Load { tile: reg, from: base, stride: index }, len)
            }
            (0x4b, 2, _) if mode < 3 && rm == 4 => {
                let Place { base, index, len } = in_memory()?;
                (Self::Store { tile: reg, to: base, stride: index }, len)
            }
            (0x5c, 2, 3) => (Self::Dot { sum: reg, left: usize::from(rm), right: vvvv }, 5),
            _ => return None,
        })
    }
}

impl Place {
    /// The operand in memory of the instruction with VEX of three bytes at `code`.
    ///
    /// # Safety
    /// As for [`Instruction::decode`].
    unsafe fn decode(code: *const u8, registers: &[i64; 23]) -> Option<Self> {
        use libc::*;
        const ORDER: [c_int; 16] = [
            REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
            REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
        ];
        // SAFETY: the caller's promise.
        let byte = |i: usize| unsafe { *code.add(i) };
        let value = |number: usize| registers[ORDER[number] as usize] as usize;
        let (more_index, more_base) = (!byte(1) >> 6 & 1, !byte(1) >> 5 & 1);
        let number = |low: u8, more: u8| usize::from(low & 7 | more << 3);
        let (mode, rm) = (byte(4) >> 6, byte(4) & 7);
        let (base, index, mut len) = if rm == 4 {
            let sib = byte(5);
            let index = number(sib >> 3, more_index);
            let scaled = if index == 4 { 0 } else { value(index) << (sib >> 6) };
            ((sib, number(sib, more_base)), scaled, 6)
        } else {
            ((rm, number(rm, more_base)), 0, 5)
        };
        let distance = match mode {
            0 if base.0 & 7 == 5 => return None, // an address without a base
            0 => 0,
            1 => {
                len += 1;
                isize::from(byte(len - 1) as i8)
            }
            _ => {
                len += 4;
                i32::from_le_bytes([4, 3, 2, 1].map(|back| byte(len - back))) as isize
            }
        };
        Some(Self { base: value(base.1).wrapping_add_signed(distance), index, len })
    }
}

impl State {
    const RELEASED: Self = Self { data: [[[0; 64]; 16]; 8], rows: [0; 8], row_bytes: [0; 8] };

    /// `None` where the CPU would refuse it.
    ///
    /// # Safety
    /// As for the instruction.
    unsafe fn run(&mut self, instruction: &Instruction) -> Option<()> {
        match *instruction {
            // SAFETY: the instruction reads 64 bytes.
            Instruction::Configure { from } => unsafe { self.configure(from as *const u8) },
            Instruction::Release => {
                *self = Self::RELEASED;
                Some(())
            }
            Instruction::Zero { tile } => {
                self.shape(tile)?;
                self.data[tile] = [[0; 64]; 16];
                Some(())
            }
            Instruction::Load { tile, from, stride } => {
                let (rows, row_bytes) = self.shape(tile)?;
                self.data[tile] = [[0; 64]; 16];
                for row in 0..rows {
                    let from = (from + row * stride) as *const u8;
                    let to = self.data[tile][row].as_mut_ptr();
                    // SAFETY: the instruction reads these bytes.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, row_bytes) };
                }
                Some(())
            }
            Instruction::Store { tile, to, stride } => {
                let (rows, row_bytes) = self.shape(tile)?;
                for row in 0..rows {
                    let from = self.data[tile][row].as_ptr();
                    // SAFETY: the instruction writes these bytes.
                    unsafe {
                        let to = (to + row * stride) as *mut u8;
                        std::ptr::copy_nonoverlapping(from, to, row_bytes);
                    }
                }
                Some(())
            }
            Instruction::Dot { sum, left, right } => self.dot(sum, left, right),
        }
    }

    /// # Safety
    /// 64 bytes must be readable.
    unsafe fn configure(&mut self, from: *const u8) -> Option<()> {
        // SAFETY: the caller's promise.
        let byte = |i: usize| unsafe { *from.add(i) };
        if byte(0) != 1 || (1..16).chain(32..48).chain(56..64).any(|i| byte(i) != 0) {
            return None;
        }
        for tile in 0..8 {
            let row_bytes = u16::from_le_bytes([byte(16 + 2 * tile), byte(17 + 2 * tile)]);
            let rows = byte(48 + tile);
            if rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0) {
                return None;
            }
            (self.rows[tile], self.row_bytes[tile]) = (rows, row_bytes);
        }
        self.data = [[[0; 64]; 16]; 8];
        Some(())
    }

    /// Rows of a tile and bytes of a row.
    fn shape(&self, tile: usize) -> Option<(usize, usize)> {
        let rows = *self.rows.get(tile)?;
        (rows > 0).then(|| (usize::from(rows), usize::from(self.row_bytes[tile])))
    }

    fn dot(&mut self, sum: usize, left: usize, right: usize) -> Option<()> {
        let (shape, of_left) = (self.shape(sum)?, self.shape(left)?);
        let of_right = self.shape(right)?;
        let apart = sum != left && sum != right && left != right;
        let fits = of_left == (shape.0, 4 * of_right.0) && of_right.1 == shape.1;
        if !apart || !fits {
            return None;
        }
        let bf16 = |row: &[u8; 64], i: usize| {
            flush(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16))
        };
        for m in 0..shape.0 {
            for n in 0..shape.1 / 4 {
                let mut chains = [0.0_f32; 2];
                for k in 0..of_right.0 {
                    for (odd, chain) in chains.iter_mut().enumerate() {
                        let x = bf16(&self.data[left][m], 2 * k + odd);
                        let w = bf16(&self.data[right][k], 2 * n + odd);
                        *chain = flush(x.mul_add(w, *chain));
                    }
                }
                let place = &mut self.data[sum][m][4 * n..4 * n + 4];
                let before = flush(f32::from_le_bytes(place.try_into().ok()?));
                let after = flush(before + flush(chains[0] + chains[1]));
                place.copy_from_slice(&after.to_le_bytes());
            }
        }
        Some(())
    }
}

/// The tiles take subnormals as zero, and leave none.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
}
