// libcuda.so.1 for tests (scripts/cuda-check), linked with kernels/host/*.cpp: "device" memory is host memory, kernels are the host-shim builds of kernels/*.cu.
// It enforces the driver rules that Rust launch code gets wrong: grid/block limits, >48 KiB dynamic shared memory
// without the opt-in attribute, unknown kernel names, parameter layout of the PTX, and what may not happen in a capture.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>
#define API extern "C" __attribute__((visibility("default"))) int
typedef int (*EmuFn)(const unsigned*, const unsigned*, size_t, uint64_t, void**, char*, size_t);
struct Func { std::string name; EmuFn fn; std::vector<unsigned> sizes; int max_dyn = 48 * 1024; };
struct Mod { std::map<std::string, std::vector<unsigned>> entries; std::map<std::string, Func> fns; };
typedef std::vector<std::function<int()>> Graph;
struct Stream { bool capturing = false; Graph g; };
struct Event { Stream* captured_on = nullptr; bool recorded = false; };
static Stream legacy, per_thread; static int primary_ctx; static thread_local void* cur_ctx; static size_t n_launch, n_sync;
static int n_capturing;  // calls that may not happen while some stream captures (global/thread-local mode)
#define NOT_IN_CAPTURE(what) do { if (n_capturing) return fail(900, what " during capture"); } while (0)
static Stream* S(void* s) { return s == nullptr || s == (void*)1 ? &legacy : s == (void*)2 ? &per_thread : (Stream*)s; }
static int fail(int code, const char* what) { fprintf(stderr, "fake-cuda: %s -> %d\n", what, code); return code; }
static int run(void* s, std::function<int()> f) { Stream* st = S(s); if (st->capturing) { st->g.push_back(f); return 0; } return f(); }
API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* v) { *v = 13000; return 0; }
API cuDeviceGetCount(int* n) { *n = 1; return 0; }
API cuDeviceGet(int* d, int o) { if (o) return 101; *d = 0; return 0; }
API cuDeviceGetName(char* n, int l, int) { snprintf(n, l, "fake H100 (host shim)"); return 0; }
API cuDeviceTotalMem_v2(size_t* b, int) { *b = 8ull << 30; return 0; }
API cuDeviceGetAttribute(int* v, int a, int) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 115 ? 1 : a == 16 ? 132 : a == 97 ? 227 * 1024 : a == 1 ? 1024 : a == 10 ? 32 : 0; return 0; }
API cuDevicePrimaryCtxRetain(void** c, int) { *c = &primary_ctx; return 0; }
API cuDevicePrimaryCtxRelease_v2(int) { return 0; }
API cuCtxGetCurrent(void** c) { *c = cur_ctx; return 0; }
API cuCtxSetCurrent(void* c) { cur_ctx = c; return 0; }
API cuCtxSynchronize() { ++n_sync; NOT_IN_CAPTURE("cuCtxSynchronize"); return 0; }
API cuGetErrorString(int e, const char** s) { static thread_local char b[64]; snprintf(b, 64, "fake CUDA error %d", e); *s = b; return 0; }
API cuGetErrorName(int e, const char** s) { return cuGetErrorString(e, s); }
API cuStreamCreate(void** s, unsigned) { *s = new Stream; return 0; }
API cuStreamCreateWithPriority(void** s, unsigned, int) { *s = new Stream; return 0; }
API cuStreamDestroy_v2(void* s) { delete (Stream*)s; return 0; }
API cuStreamSynchronize(void* s) { ++n_sync; return S(s)->capturing ? fail(900, "cuStreamSynchronize during capture") : 0; }
API cuEventCreate(void** e, unsigned) { *e = new Event; return 0; }
API cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
API cuEventRecord(void* e, void* s) { Event* v = (Event*)e; v->recorded = true; v->captured_on = S(s)->capturing ? S(s) : nullptr; return 0; }
API cuEventSynchronize(void*) { ++n_sync; return 0; }
API cuEventQuery(void*) { return 0; }
API cuEventElapsedTime_v2(float* f, void*, void*) { *f = 0; return 0; }
API cuStreamWaitEvent(void* s, void* e, unsigned) {
    Event* v = (Event*)e;
    if (S(s)->capturing && v->recorded && v->captured_on != S(s)) return fail(905, "capturing stream waits on an event recorded outside the capture (disable_event_tracking()?)");
    return 0;
}
API cuStreamIsCapturing(void* s, int* st) { *st = S(s)->capturing; return 0; }
API cuStreamBeginCapture_v2(void* s, int) { if (S(s) == &legacy) return fail(900, "capture on the legacy default stream"); S(s)->capturing = true; ++n_capturing; S(s)->g.clear(); return 0; }
API cuStreamEndCapture(void* s, void** g) { if (!S(s)->capturing) return fail(901, "end of no capture"); S(s)->capturing = false; --n_capturing; *g = new Graph(S(s)->g); return 0; }
API cuGraphInstantiateWithFlags(void** x, void* g, unsigned long long) { *x = new Graph(*(Graph*)g); return 0; }
API cuGraphLaunch(void* x, void*) { for (auto& f : *(Graph*)x) if (int e = f()) return e; return 0; }
API cuGraphUpload(void*, void*) { return 0; }
API cuGraphDestroy(void* g) { delete (Graph*)g; return 0; }
API cuGraphExecDestroy(void* g) { delete (Graph*)g; return 0; }
static int alloc(uint64_t* p, size_t n) { *p = (uint64_t)aligned_alloc(512, (n + 511) / 512 * 512 + 512); memset((void*)*p, 0xCD, n); return 0; }
API cuMemAlloc_v2(uint64_t* p, size_t n) { NOT_IN_CAPTURE("cuMemAlloc"); return alloc(p, n); }
API cuMemAllocAsync(uint64_t* p, size_t n, void*) { return alloc(p, n); }
API cuMemFree_v2(uint64_t p) { free((void*)p); return 0; }
API cuMemFreeAsync(uint64_t p, void*) { free((void*)p); return 0; }
API cuMemHostAlloc(void** p, size_t n, unsigned) { *p = malloc(n); return 0; }
API cuMemFreeHost(void* p) { free(p); return 0; }
API cuMemGetInfo_v2(size_t* f, size_t* t) { *f = *t = 8ull << 30; return 0; }
API cuMemsetD8Async(uint64_t p, unsigned char c, size_t n, void* s) { return run(s, [=] { memset((void*)p, c, n); return 0; }); }
API cuMemsetD8_v2(uint64_t p, unsigned char c, size_t n) { memset((void*)p, c, n); return 0; }
API cuMemcpyHtoDAsync_v2(uint64_t d, const void* h, size_t n, void* s) { return run(s, [=] { memcpy((void*)d, h, n); return 0; }); }
API cuMemcpyDtoHAsync_v2(void* h, uint64_t d, size_t n, void* s) { return run(s, [=] { memcpy(h, (void*)d, n); return 0; }); }
API cuMemcpyDtoDAsync_v2(uint64_t d, uint64_t a, size_t n, void* s) { return run(s, [=] { memmove((void*)d, (void*)a, n); return 0; }); }
API cuMemcpyHtoD_v2(uint64_t d, const void* h, size_t n) { NOT_IN_CAPTURE("synchronous copy"); memcpy((void*)d, h, n); return 0; }
API cuMemcpyDtoH_v2(void* h, uint64_t d, size_t n) { NOT_IN_CAPTURE("synchronous copy"); memcpy(h, (void*)d, n); return 0; }
API cuModuleLoadData(void** m, const void* img) {
    NOT_IN_CAPTURE("cuModuleLoadData"); const char* t = (const char*)img;
    if (!memcmp(t, "\x7f" "ELF", 4)) return fail(209, "cubin images are not supported by the fake driver");
    Mod* mod = new Mod; std::string s(t); size_t p = 0;
    while ((p = s.find(".entry ", p)) != std::string::npos) {
        p += 7; size_t a = s.find('(', p), z = s.find(')', a); std::string name = s.substr(p, a - p), ps = s.substr(a, z - a);
        std::vector<unsigned> sz; size_t q = 0;
        while ((q = ps.find(".param ", q)) != std::string::npos) {
            q += 7; unsigned n = 0; size_t e = ps.find(',', q); std::string d = ps.substr(q, e == std::string::npos ? e : e - q);
            if (auto k = d.find('['); k != std::string::npos) n = atoi(d.c_str() + k + 1);  // .align 8 .b8 name[24]
            else n = atoi(d.c_str() + d.find_first_of("0123456789")) / 8;                     // .u64 name
            sz.push_back(n);
        }
        mod->entries[name] = sz; p = z;
    }
    *m = mod; return 0;
}
API cuModuleUnload(void* m) { delete (Mod*)m; return 0; }
API cuModuleGetFunction(void** f, void* m, const char* name) {
    Mod* mod = (Mod*)m; auto it = mod->entries.find(name);
    if (it == mod->entries.end()) return fail(500, (std::string("no .entry ") + name + " in the PTX").c_str());
    auto& fn = mod->fns[name];
    if (!fn.fn) {
        fn.name = name; fn.sizes = it->second; fn.fn = (EmuFn)dlsym(RTLD_DEFAULT, (std::string("emu_") + name).c_str());
        auto sz = (int (*)(unsigned*))dlsym(RTLD_DEFAULT, (std::string("emu_sizes_") + name).c_str());
        if (sz) { unsigned o[64]; std::vector<unsigned> v(o, o + sz(o)); if (v != fn.sizes) return fail(500, (std::string(name) + ": the PTX's parameters are not those of the .cu (stale PTX?)").c_str()); }
    }
    *f = &fn; return 0;
}
API cuFuncSetAttribute(void* f, int a, int v) { if (a == 8) { if (v > 227 * 1024) return fail(1, "dynamic shared memory > 227 KiB"); ((Func*)f)->max_dyn = v; } return 0; }
API cuFuncGetAttribute(int* v, int, void*) { *v = 0; return 0; }
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned smem, void* s, void** params, void**) {
    Func* fn = (Func*)f; ++n_launch;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || !by || !bz || bx * by * bz > 1024 || bz > 64) return fail(1, "launch configuration");
    if ((int)smem > fn->max_dyn) return fail(1, "more dynamic shared memory than allowed: set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES");
    if (!fn->fn) return fail(500, (fn->name + ": no host build of this kernel").c_str());
    std::vector<std::vector<char>> a; for (size_t i = 0; i < fn->sizes.size(); ++i) a.emplace_back((char*)params[i], (char*)params[i] + fn->sizes[i]);
    const char* e = getenv("FAKE_CUDA_SEED"); uint64_t seed = e ? strtoull(e, 0, 0) : 0;
    return run(s, [=]() mutable {
        std::vector<void*> p; for (auto& x : a) p.push_back(x.data());
        unsigned g[3] = {gx, gy, gz}, b[3] = {bx, by, bz}; char err[400] = "";
        if (fn->fn(g, b, smem, seed, p.data(), err, sizeof err)) return fail(700, (fn->name + ": " + err).c_str());
        return 0;
    });
}
API fake_cuda_launches() { return (int)n_launch; }
API fake_cuda_syncs() { return (int)n_sync; }
