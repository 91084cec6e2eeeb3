//! Shared memory of thread blocks: what kernels may take is set once, when a card is opened,
//! because all models of a card launch the same kernels.

use crate::common::{tiny_config, write_checkpoint};
use crate::failures::{alone, is_alone};
use crate::{Counter, count, driver, fail};
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::Arc;
use targon_engine::models::arithmetic::Arithmetic;
use targon_engine::models::checkpoint::Checkpoint;
use targon_engine::models::cuda::{Card, CudaPass, CudaWeights};
use targon_engine::models::pass::{Batch, Pass, RowAsk};
use targon_engine::ops::dtype::Dtype;
use targon_engine::ops::lanes::Isa;
use targon_engine::ops::pool::Pool;

const ATTEND: &str = include_str!("../../kernels/attend_tensor.sm_80.ptx");
const PRODUCTS: &str = include_str!("../../kernels/matmul_tensor.sm_80.ptx");
/// What tiles of 32 queries take of it, with heads of 128 and of 64.
const BYTES: [i32; 2] = [45_056, 40_960];
/// Attributes of a function: shared memory that is its own, and the most that a launch may add.
const STATIC: i32 = 1;
const DYNAMIC: i32 = 8;
const INVALID_VALUE: i32 = 1;
const OUT_OF_RESOURCES: i32 = 701;

/// A pass in tensor arithmetic with heads of a size.
fn pass(head_dim: u32) -> CudaPass {
    let dir = tempfile::tempdir().unwrap();
    let mut config = tiny_config();
    config["head_dim"] = head_dim.into();
    write_checkpoint(dir.path(), &config, 6);
    let (card, pool) = (Card::open(0).unwrap(), Pool::new(1, Isa::best()).unwrap());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let spec = Arc::new(checkpoint.spec().unwrap());
    let weights = CudaWeights::load(&card, &checkpoint, &spec, Dtype::Bf16, &pool, |_, _| {});
    let weights = Arc::new(weights.unwrap());
    CudaPass::new(&weights, &pool, 4).unwrap().computing(Arithmetic::Tensor)
}

#[test]
fn models_with_heads_of_two_sizes_compute_at_once() {
    if !is_alone() {
        return alone("shared::models_with_heads_of_two_sizes_compute_at_once", &[], &[]);
    }
    let mut passes = [128, 64].map(pass);
    let set = count(0, Counter::Attributes);
    assert!(set > 0, "no kernel was allowed more than it has unasked");
    std::thread::scope(|scope| {
        for pass in &mut passes {
            scope.spawn(|| {
                let ask = RowAsk { hidden: true, ..RowAsk::new(8, 8) };
                for step in 0..30 {
                    let ids: Vec<u32> = (step..step + 9).collect();
                    let rows = pass.step(&Batch::of(&ids, 0), std::slice::from_ref(&ask));
                    assert!(rows.unwrap()[0].is_ok());
                }
            });
        }
    });
    // What is set for one model cannot be too little for another when nothing is set any more.
    assert_eq!(count(0, Counter::Attributes), set);
}

/// A kernel of a module that this test loads for itself, on a device.
struct Function(*mut c_void);

impl Function {
    fn new(device: i32, ptx: &str, name: &str) -> Self {
        type Retain = unsafe extern "C" fn(*mut *mut c_void, i32) -> i32;
        type Current = unsafe extern "C" fn(*mut c_void) -> i32;
        type Load = unsafe extern "C" fn(*mut *mut c_void, *const i8) -> i32;
        type Get = unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const i8) -> i32;
        let [ptx, name] = [ptx, name].map(|text| CString::new(text).unwrap());
        let (mut context, mut module, mut function) = (null_mut(), null_mut(), null_mut());
        let done = unsafe {
            [
                driver().get::<Retain>(b"cuDevicePrimaryCtxRetain").unwrap()(&mut context, device),
                driver().get::<Current>(b"cuCtxSetCurrent").unwrap()(context),
                driver().get::<Load>(b"cuModuleLoadData").unwrap()(&mut module, ptx.as_ptr()),
                driver().get::<Get>(b"cuModuleGetFunction").unwrap()(
                    &mut function,
                    module,
                    name.as_ptr(),
                ),
            ]
        };
        assert_eq!(done, [0; 4]);
        Self(function)
    }

    fn get(&self, attribute: i32) -> i32 {
        type Get = unsafe extern "C" fn(*mut i32, i32, *mut c_void) -> i32;
        let (mut value, get) = (0, unsafe { driver().get::<Get>(b"cuFuncGetAttribute") });
        assert_eq!(unsafe { get.unwrap()(&mut value, attribute, self.0) }, 0);
        value
    }

    fn allow(&self, bytes: i32) -> i32 {
        type Set = unsafe extern "C" fn(*mut c_void, i32, i32) -> i32;
        let set = unsafe { driver().get::<Set>(b"cuFuncSetAttribute") };
        unsafe { set.unwrap()(self.0, DYNAMIC, bytes) }
    }

    /// What the driver says of a launch with so much dynamic shared memory.
    fn launch(&self, bytes: i32) -> i32 {
        type Launch = unsafe extern "C" fn(
            *mut c_void,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            *mut c_void,
            *mut *mut c_void,
            *mut c_void,
        ) -> i32;
        let launch = unsafe { driver().get::<Launch>(b"cuLaunchKernel") }.unwrap();
        let zeros = [0_u64; 3];
        let mut arguments = [zeros.as_ptr().cast_mut().cast::<c_void>(); 10];
        let (arguments, bytes) = (arguments.as_mut_ptr(), bytes as u32);
        unsafe { launch(self.0, 1, 1, 1, 512, 1, 1, bytes, null_mut(), arguments, null_mut()) }
    }
}

#[test]
fn a_launch_with_more_than_was_allowed_is_refused() {
    if !is_alone() {
        return alone("shared::a_launch_with_more_than_was_allowed_is_refused", &[], &[]);
    }
    let function = Function::new(0, ATTEND, "attend_mma_bf16_32");
    // What is not refused fails as this asks: the kernel would find no queries.
    let launch = |bytes: i32| {
        fail(0, "attend_mma_bf16_32", 0, OUT_OF_RESOURCES);
        function.launch(bytes)
    };
    // One model allows what it takes, then another: what the first one launches is refused.
    assert_eq!([function.allow(BYTES[0]), launch(BYTES[0])], [0, OUT_OF_RESOURCES]);
    assert_eq!([function.allow(BYTES[1]), launch(BYTES[0])], [0, INVALID_VALUE]);
    assert_eq!(launch(BYTES[1]), OUT_OF_RESOURCES);
}

#[test]
fn what_a_kernel_may_take_depends_on_the_card_and_on_what_it_has() {
    let own = |name| Function::new(0, PRODUCTS, name).get(STATIC);
    assert_eq!([own("decode_mma_bf16_8"), own("decode_mma_bf16_32")], [9_216, 36_864]);
    // An H100, an L40S's architecture, an A100.
    for (device, most) in [(0, 227 << 10), (5, 99 << 10), (6, 163 << 10)] {
        let function = Function::new(device, ATTEND, "attend_mma_bf16_32");
        let taken = function.get(STATIC);
        assert_eq!(taken, 5_376);
        assert_eq!(function.get(DYNAMIC), (48 << 10) - taken);
        assert_eq!(function.allow(most - taken), 0);
        assert_eq!(function.get(DYNAMIC), most - taken);
        assert_eq!(function.allow(most - taken + 1), INVALID_VALUE);
    }
}
