//! Finds out whether this process may use the tiles of AMX, and whether they compute the canon.
//!
//! A CPU names them, a hypervisor may hide them or a part of it, the system saves them when threads
//! change or does not, and a process must ask for them. What still remains (an instruction that a
//! host refuses, or other bits) shows in a child process that tries them.

use std::io;
use std::sync::OnceLock;

/// Why tiles are not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TilesError {
    /// The CPU does not name them.
    #[error("this CPU names no AMX for bf16")]
    Absent,
    /// The bits of XCR0 that say what the system saves lack those of tiles.
    #[error("the system does not save tiles when threads change (XCR0 is {0:#x})")]
    NotSaved(u64),
    /// They are not those that the kernels are written for.
    #[error("palette 1 has {tiles} tiles of {rows} rows of {row_bytes} bytes, not 8 of 16 of 64")]
    Shape {
        /// Number of tiles.
        tiles: u32,
        /// Rows of one.
        rows: u32,
        /// Bytes of a row.
        row_bytes: u32,
    },
    /// The kernel's answer to the process that asks for them.
    #[error("the kernel refuses tiles to this process: {}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// No child process could be started that tries them.
    #[error("nothing could try the tiles: {}", io::Error::from_raw_os_error(*.0))]
    Untried(i32),
    /// What ended the child process that tried them.
    #[error("the CPU names tiles, and their instructions end a process with signal {0}")]
    Signal(i32),
    /// They do not compute the canon.
    #[error("the tiles of this CPU give other bits than the canon")]
    Bits,
}

/// Whether tiles are used, and why not. It is found out once, at the first call.
///
/// # Errors
/// Why they are not.
pub fn usable() -> Result<(), TilesError> {
    static FOUND: OnceLock<Result<(), TilesError>> = OnceLock::new();
    *FOUND.get_or_init(find)
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn find() -> Result<(), TilesError> {
    Err(TilesError::Absent)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn find() -> Result<(), TilesError> {
    Facts::of_this_cpu().check()?;
    ask()?;
    trial::outcome(trial::run()?)
}

/// What the CPU says of tiles.
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code))]
#[derive(Clone, Copy)]
struct Facts {
    has_tiles: bool,
    has_bf16: bool,
    /// XCR0: what the system saves when threads change.
    saved: u64,
    tiles: u32,
    rows: u32,
    row_bytes: u32,
}

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), allow(dead_code))]
impl Facts {
    /// Bits of XCR0 for the configuration of tiles and for what they hold.
    const SAVED: u64 = 0b11 << 17;

    fn check(&self) -> Result<(), TilesError> {
        let Self { tiles, rows, row_bytes, .. } = *self;
        if !self.has_tiles || !self.has_bf16 {
            return Err(TilesError::Absent);
        }
        if self.saved & Self::SAVED != Self::SAVED {
            return Err(TilesError::NotSaved(self.saved));
        }
        if (tiles, rows, row_bytes) != (8, 16, 64) {
            return Err(TilesError::Shape { tiles, rows, row_bytes });
        }
        Ok(())
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn of_this_cpu() -> Self {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        const TILES: u32 = 0x1d;
        let bit = |register: u32, bit: u32| register >> bit & 1 == 1;
        let none =
            Self { has_tiles: false, has_bf16: false, saved: 0, tiles: 0, rows: 0, row_bytes: 0 };
        let (leaves, features) = (__cpuid(0).eax, __cpuid(1).ecx);
        if leaves < TILES || !bit(features, 27) {
            return none; // bit 27: the system uses XSAVE, so XCR0 can be read
        }
        let (more, palette) = (__cpuid_count(7, 0).edx, __cpuid_count(TILES, 1));
        Self {
            has_tiles: bit(more, 24),
            has_bf16: bit(more, 22),
            saved: xcr0(),
            tiles: palette.ebx >> 16,
            rows: palette.ecx & 0xffff,
            row_bytes: palette.ebx & 0xffff,
        }
    }
}

/// What the system saves when threads change.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller has seen that the system uses XSAVE, so XGETBV may be used.
    unsafe {
        std::arch::asm!(
            "xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nostack, nomem, preserves_flags)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Asks the kernel for tiles. It then saves 8 KiB more of a thread's state, and only once the
/// thread has used them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn ask() -> Result<(), TilesError> {
    /// `ARCH_REQ_XCOMP_PERM` of the kernel's asm/prctl.h, and the number of what tiles hold.
    const REQUEST: libc::c_int = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call has two numbers and no pointers.
    match unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } {
        0 => Ok(()),
        _ => Err(TilesError::Refused(errno())),
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Tries the tiles in a child process, which an instruction that is refused may end.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod trial {
    use super::super::unit::{OUTPUTS, ROWS_MAX, Tiles};
    use super::{TilesError, errno};
    use half::bf16;

    /// Pairs of k: two blocks and a shorter one.
    const PAIRS: usize = 41;
    /// Rows that are multiplied at once: one tile of them, and two.
    const ROWS: [usize; 2] = [5, 29];
    /// What the child ends with.
    const EQUAL: i32 = 0;
    const OTHER: i32 = 1;

    pub(super) struct Trial {
        weights: [u16; PAIRS * OUTPUTS * 2],
        inputs: [u16; ROWS_MAX * PAIRS * 2],
        pub(super) want: [[f32; OUTPUTS]; ROWS_MAX],
    }

    impl Trial {
        pub(super) fn new() -> Self {
            let mut state = 1_u32;
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Sixteen powers of two, so that another order shows.
                let scale = ((state >> 4 & 15) as f32 - 8.0).exp2();
                bf16::from_f32((f64::from(state) / f64::from(u32::MAX) - 0.5) as f32 * scale)
            };
            let mut trial = Self {
                weights: [0; PAIRS * OUTPUTS * 2],
                inputs: [0; ROWS_MAX * PAIRS * 2],
                want: [[0.0; OUTPUTS]; ROWS_MAX],
            };
            trial.weights.iter_mut().for_each(|w| *w = value().to_bits());
            trial.inputs.iter_mut().for_each(|x| *x = value().to_bits());
            for row in 0..ROWS_MAX {
                for output in 0..OUTPUTS {
                    trial.want[row][output] = trial.canon(row, output);
                }
            }
            trial
        }

        fn canon(&self, row: usize, output: usize) -> f32 {
            let wide = |bits: u16| bf16::from_bits(bits).to_f32();
            let (mut sum, mut chains) = (0.0, [0.0_f32; 2]);
            for k in 0..2 * PAIRS {
                let w = wide(self.weights[(k / 2 * OUTPUTS + output) * 2 + k % 2]);
                let x = wide(self.inputs[row * 2 * PAIRS + k]);
                chains[k % 2] = w.mul_add(x, chains[k % 2]);
                if k % 32 == 31 || k == 2 * PAIRS - 1 {
                    sum += chains[0] + chains[1];
                    chains = [0.0; 2];
                }
            }
            sum
        }

        /// Allocates nothing: a child of a process with threads may not.
        ///
        /// # Safety
        /// As for [`Tiles::new`], but that instructions may be refused.
        pub(super) unsafe fn is_right(&self) -> bool {
            // SAFETY: the caller's promise.
            let mut tiles = unsafe { Tiles::new() };
            ROWS.into_iter().all(|rows| {
                let mut got = [[f32::NAN; OUTPUTS]; ROWS_MAX];
                tiles.product(&self.weights, &self.inputs[..rows * 2 * PAIRS], rows, &mut got);
                let bits = |row: &[f32; OUTPUTS]| row.map(f32::to_bits);
                (0..rows).all(|row| bits(&got[row]) == bits(&self.want[row]))
            })
        }
    }

    /// How the child ended: what `waitpid` says.
    pub(super) fn run() -> Result<i32, TilesError> {
        let trial = Trial::new();
        // SAFETY: the child allocates nothing, takes no lock and ends by `_exit`, so it does not
        // matter what other threads of this process were doing.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: the kernel has granted tiles. If they are refused all the same, the signal
            // ends this child alone, which leaves no dump.
            unsafe {
                libc::prctl(libc::PR_SET_DUMPABLE, 0);
                libc::signal(libc::SIGILL, libc::SIG_DFL);
                libc::_exit(if trial.is_right() { EQUAL } else { OTHER });
            }
        }
        if child < 0 {
            return Err(TilesError::Untried(errno()));
        }
        let mut status = 0;
        // SAFETY: `status` is writable; the child is ours and is waited for once.
        while unsafe { libc::waitpid(child, &raw mut status, 0) } < 0 {
            if errno() != libc::EINTR {
                return Err(TilesError::Untried(errno()));
            }
        }
        Ok(status)
    }

    /// What a child's end says of the tiles.
    pub(super) fn outcome(status: i32) -> Result<(), TilesError> {
        if libc::WIFSIGNALED(status) {
            return Err(TilesError::Signal(libc::WTERMSIG(status)));
        }
        match libc::WEXITSTATUS(status) {
            EQUAL => Ok(()),
            _ => Err(TilesError::Bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Facts = Facts {
        has_tiles: true,
        has_bf16: true,
        saved: 0x6_02e7,
        tiles: 8,
        rows: 16,
        row_bytes: 64,
    };

    #[test]
    fn a_cpu_that_hides_a_part_of_its_tiles_has_none() {
        let refused = |facts: Facts| facts.check().unwrap_err().to_string();
        assert_eq!(WHOLE.check(), Ok(()));
        for facts in [Facts { has_tiles: false, ..WHOLE }, Facts { has_bf16: false, ..WHOLE }] {
            assert_eq!(refused(facts), "this CPU names no AMX for bf16");
        }
        for saved in [0x2_02e7, 0x4_02e7, 0x2e7, 0] {
            let want =
                format!("the system does not save tiles when threads change (XCR0 is {saved:#x})");
            assert_eq!(refused(Facts { saved, ..WHOLE }), want);
        }
        assert_eq!(
            refused(Facts { tiles: 0, rows: 0, row_bytes: 0, ..WHOLE }),
            "palette 1 has 0 tiles of 0 rows of 0 bytes, not 8 of 16 of 64"
        );
        assert!(Facts { rows: 8, ..WHOLE }.check().is_err());
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_end_of_the_child_says_whether_tiles_are_used() {
        let signal = trial::outcome(libc::SIGILL); // a status is its signal
        assert_eq!(signal, Err(TilesError::Signal(libc::SIGILL)));
        assert_eq!(trial::outcome(1 << 8), Err(TilesError::Bits));
        assert_eq!(trial::outcome(0), Ok(()));
        // A CPU without tiles refuses their instructions, which ends the child and nothing else.
        if usable() == Err(TilesError::Absent) {
            let tried = trial::run().and_then(trial::outcome);
            assert_eq!(tried, Err(TilesError::Signal(libc::SIGILL)));
        }
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn a_trial_finds_one_wrong_bit() {
        // On a CPU that has tiles, the kernel is asked before the first instruction.
        let _ = usable();
        super::super::emulated::install();
        let mut trial = trial::Trial::new();
        // SAFETY: what the CPU refuses is computed in software.
        unsafe {
            assert!(trial.is_right());
            trial.want[28][63] = trial.want[28][63].next_up();
            assert!(!trial.is_right());
        }
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn a_kernel_that_grants_tiles_says_so() {
        let names = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        if !names.contains("amx_tile") {
            assert_ne!(usable(), Ok(()), "no tiles are named, and they are used");
            assert!(ask().is_err(), "tiles are granted that are not named");
        }
    }
}
