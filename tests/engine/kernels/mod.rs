//! The CUDA kernels on the CPU: the unchanged `.cu` files, compiled with g++ through
//! `kernels/host/shim.h`, against the Rust code they are twins of. Nothing here has run on a card.
//!
//! Results that are called equal have equal bits; a NaN equals a NaN, because which of its patterns
//! an addition leaves is the hardware's choice.

#![allow(clippy::undocumented_unsafe_blocks, reason = "a test may fail")]

mod attention;
mod attention_tensor;
mod ceiling;
mod draw;
mod experts;
mod logits;
mod matmul;
mod pass;
mod proof;
mod rows;
mod tensor;

use sha2::{Digest, Sha256};
use std::ffi::{CStr, c_char, c_void};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The layer's shape as the kernels take it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    window: i32,
    scale: f32,
    cap: f32,
}

/// The kernels' host builds, one for each `.cu`.
const SOURCES: [&str; 13] = [
    "attend",
    "attend_tensor",
    "ceiling",
    "draw",
    "embed",
    "experts",
    "gate",
    "logprob",
    "matmul_portable",
    "matmul_tensor",
    "norm",
    "proof",
    "qkv_finish",
];
const FLAGS: [&str; 7] =
    ["-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"];

/// The address of a scalar, or of a pointer to a slice's data.
macro_rules! args {
    ($($value:expr),* $(,)?) => { [$((&raw const $value).cast_mut().cast::<c_void>()),*] };
}
use args;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

/// Of everything that a build of the kernels reads.
fn digest_of_sources() -> String {
    let mut paths: Vec<PathBuf> = [directory(), directory().join("host")]
        .iter()
        .flat_map(|d| fs::read_dir(d).unwrap().map(|e| e.unwrap().path()))
        .filter(|p| p.extension().is_some_and(|x| x != "ptx"))
        .collect();
    paths.sort();
    let mut digest = Sha256::new_with_prefix(FLAGS.concat());
    for path in paths {
        digest.update(path.to_string_lossy().as_bytes());
        digest.update(fs::read(path).unwrap());
    }
    hex::encode(&digest.finalize()[..8])
}

/// Builds `output` from host sources, or takes what another test process built of the same text:
/// tests run in processes of their own, side by side.
fn compile(output: &str, extra: &[&str], sources: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    fs::create_dir_all(&folder).unwrap();
    let output = folder.join(format!("{}-{output}", digest_of_sources()));
    let lock = File::create(output.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if output.exists() {
        return output;
    }
    let objects: Vec<PathBuf> = sources
        .iter()
        .map(|s| output.with_extension(format!("{s}.{}.o", std::process::id())))
        .collect();
    let jobs: Vec<_> = sources
        .iter()
        .zip(&objects)
        .map(|(source, object)| {
            Command::new("g++")
                .args(FLAGS)
                .args(extra.iter().filter(|f| **f != "-shared"))
                .arg("-c")
                .arg(directory().join("host").join(format!("{source}.cpp")))
                .arg("-o")
                .arg(object)
                .spawn()
                .expect("g++ is needed to run the kernels on the CPU")
        })
        .collect();
    assert!(jobs.into_iter().all(|mut job| job.wait().unwrap().success()));
    let part = output.with_extension("part");
    let link = Command::new("g++")
        .args(extra)
        .args(&objects)
        .arg("-o")
        .arg(&part)
        .arg("-lpthread")
        .status();
    assert!(link.unwrap().success());
    fs::rename(part, &output).unwrap();
    objects.iter().for_each(|o| fs::remove_file(o).unwrap());
    output
}

type Launch = unsafe extern "C" fn(
    *const u32,
    *const u32,
    usize,
    u64,
    *mut *mut c_void,
    *mut c_char,
    usize,
) -> i32;

/// A build of all kernels.
struct Kernels {
    library: libloading::Library,
}

/// The kernels as they are.
fn kernels() -> &'static Kernels {
    static LIBRARY: OnceLock<Kernels> = OnceLock::new();
    LIBRARY.get_or_init(|| Kernels::load(&compile("kernels.so", &["-shared"], &SOURCES)))
}

/// A control arm: one file built with a macro that breaks it. A test has to notice. It stays
/// loaded, because threads keep storage of it until they end.
fn broken(source: &str, define: &str) -> &'static Kernels {
    let name = format!("{source}-{}.so", define.replace('=', "-"));
    let path = compile(&name, &["-shared", &format!("-D{define}")], &[source]);
    Box::leak(Box::new(Kernels::load(&path)))
}

impl Kernels {
    fn load(path: &Path) -> Self {
        Self { library: unsafe { libloading::Library::new(path) }.unwrap() }
    }

    /// Launches `kernel` as cuLaunchKernel would; `seed` picks the order of threads.
    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        threads: u32,
        smem: usize,
        seed: u64,
        args: &[*mut c_void],
    ) {
        let name = format!("emu_{kernel}");
        let launch: libloading::Symbol<Launch> =
            unsafe { self.library.get(name.as_bytes()) }.unwrap();
        let (block, mut error) = ([threads, 1, 1], [0 as c_char; 400]);
        let mut args = args.to_vec();
        let code = unsafe {
            launch(
                grid.as_ptr(),
                block.as_ptr(),
                smem,
                seed,
                args.as_mut_ptr(),
                error.as_mut_ptr(),
                400,
            )
        };
        assert_eq!(code, 0, "{kernel}: {:?}", unsafe { CStr::from_ptr(error.as_ptr()) });
    }
}

/// The first place where the bits differ.
fn first_difference(got: &[f32], want: &[f32]) -> Option<usize> {
    assert_eq!(got.len(), want.len());
    got.iter()
        .zip(want)
        .position(|(g, w)| g.to_bits() != w.to_bits() && !(g.is_nan() && w.is_nan()))
}

fn assert_same(got: &[f32], want: &[f32], place: &str) {
    if let Some(at) = first_difference(got, want) {
        panic!("{place}: element {at} is {:e}, not {:e}", got[at], want[at]);
    }
}

fn sanitized(name: &str) {
    let flag = format!("-fsanitize={name}");
    let sources: Vec<&str> = SOURCES.iter().copied().chain(["check"]).collect();
    let program = compile(&format!("check-{name}"), &[flag.as_str()], &sources);
    let output = Command::new(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("0 failed") && !text.contains("WARNING: ThreadSanitizer"), "{text}");
}

#[test]
fn no_access_is_out_of_bounds() {
    sanitized("address");
}

#[test]
fn no_two_threads_race() {
    sanitized("thread");
}

/// The kernels of a PTX text with the sizes of their parameters in bytes.
fn entries(ptx: &str) -> Vec<(String, Vec<u32>)> {
    let size_of = |parameter: &str| -> u32 {
        // `.param .align 8 .b8 name[24]`, or `.param .u64 name`.
        if let Some((_, len)) = parameter.split_once('[') {
            return len.trim_end_matches(']').parse().unwrap();
        }
        let kind =
            parameter.split('.').find(|part| part.starts_with(['u', 's', 'b', 'f'])).unwrap();
        kind.split_whitespace().next().unwrap()[1..].parse::<u32>().unwrap() / 8
    };
    let of_entry = |text: &str| {
        let (name, rest) = text.split_once('(').unwrap();
        let parameters = rest.split_once(')').unwrap().0;
        let sizes = parameters.split(',').map(str::trim).filter(|p| !p.is_empty()).map(size_of);
        (name.trim().to_owned(), sizes.collect())
    };
    ptx.split(".entry ").skip(1).map(of_entry).collect()
}

#[test]
fn ptx_has_the_parameters_of_the_sources() {
    let mut count = 0;
    for name in SOURCES {
        let text = fs::read_to_string(directory().join(format!("{name}.sm_80.ptx"))).unwrap();
        let source = fs::read_to_string(directory().join(format!("{name}.cu"))).unwrap();
        let entries = entries(&text);
        assert!(source.contains("__global__") && !entries.is_empty(), "{name}");
        for (kernel, want) in entries {
            type Sizes = unsafe extern "C" fn(*mut u32) -> i32;
            let symbol = format!("emu_sizes_{kernel}");
            let sizes: libloading::Symbol<Sizes> =
                unsafe { kernels().library.get(symbol.as_bytes()) }
                    .unwrap_or_else(|_| panic!("{kernel} of {name} has no host build"));
            let mut got = [0; 64];
            let len = unsafe { sizes(got.as_mut_ptr()) } as usize;
            assert_eq!(got[..len], want, "{kernel}: scripts/kernels was not run");
            count += 1;
        }
    }
    assert!(count >= 53, "{count} kernels");
}

#[test]
fn every_source_has_a_host_build_that_is_tested() {
    let found = fs::read_dir(directory()).unwrap().map(|e| e.unwrap().path());
    let mut names: Vec<String> = found
        .filter(|p| p.extension().is_some_and(|x| x == "cu"))
        .map(|p| p.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, SOURCES);
}
