// A stand-in for libcuda.so.1, for tests on machines without a card (scripts/cuda-check): "device"
// memory is host memory, kernels are the host builds of kernels/*.cu, linked into this library.
//
// It refuses what a driver refuses and launch code gets wrong: limits of a grid, more shared memory than
// a function was allowed, or than a block of the device may have, names that the PTX lacks, parameters
// that differ from those of the source, pointers that lie in no allocation of the device, more memory
// than the device has, and what may not happen while a stream is captured. fake_cuda_* say what goes
// wrong when, by device, so that tests do not meet in one process. A fault that breaks a context stays:
// every later call on that device returns it, as on a card.
//
// Environment: FAKE_CUDA_DRIVER (13000), FAKE_CUDA_DEVICES (8), FAKE_CUDA_SEED (order of threads);
// FAKE_CUDA_INIT, FAKE_CUDA_RETAIN, FAKE_CUDA_JIT: what cuInit, the primary context or the compiler says.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

enum {
    INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    NO_BINARY = 209, INVALID_CONTEXT = 201, NOT_FOUND = 500, OUT_OF_RESOURCES = 701, LAUNCH_FAILED = 719,
    STUB_LIBRARY = 34, INVALID_PTX = 218, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905
};

static long env(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text ? strtol(text, nullptr, 0) : otherwise;
}

static int fail(int code, const std::string& what) {
    if (env("FAKE_CUDA_VERBOSE", 0)) fprintf(stderr, "fake-cuda: %s -> %d\n", what.c_str(), code);
    return code;
}

// What tests count, by device: fake_cuda_count.
enum Counter {
    LAUNCHES, SYNCS, COPIES_TO_HOST, COPIES_TO_DEVICE, GRAPH_LAUNCHES, ALLOCATIONS, ATTRIBUTES, CONTEXT_SYNCS,
    COUNTERS
};

struct Stream;

struct Device {
    const char* name;
    int major;
    size_t memory;
    int minor = 0;
    std::mutex mutex;
    std::map<uint64_t, size_t> allocations;  // by address: bytes
    size_t used = 0;
    std::atomic<int> broken{0};  // a fault that stays
    std::string fails_at;        // kernel, or any where it is empty
    long fails_after = -1;       // so many launches of it; -1 never
    int fails_with = 0;
    std::vector<Stream*> captured;  // that are being captured
    long disturbed_after = -1;      // so many launches of a capture; -1 never
    std::atomic<long> counts[COUNTERS] = {};
    int context = 0;  // its address is the context
};

static const size_t GIB = 1ull << 30;
static const int SHARED_DEFAULT = 48 << 10;  // bytes of a block that nobody asked more for
// Devices 4 and 5 are refused: one is too old, one too small.
static Device devices[] = {
    {"stand-in H100", 9, 8 * GIB}, {"stand-in H100", 9, 8 * GIB}, {"stand-in H100", 9, 8 * GIB},
    {"stand-in H100", 9, 8 * GIB}, {"stand-in T4", 7, 8 * GIB, 5}, {"stand-in, small", 8, 1 << 20, 9},
    {"stand-in A100", 8, 8 * GIB}, {"stand-in H100", 9, 8 * GIB}};
// Bytes of shared memory that a block may have where a function asks for them, by capability.
static int shared_max(const Device& d) {
    if (d.major == 7) return 64 << 10;
    if (d.major == 8) return (d.minor == 0 ? 163 : 99) << 10;
    return (d.major == 12 ? 99 : 227) << 10;
}
static int device_count() { return (int)std::min<long>(env("FAKE_CUDA_DEVICES", 8), 8); }

typedef int (*Kernel)(const unsigned*, const unsigned*, size_t, uint64_t, void**, char*, size_t);
struct Function {
    std::string name;
    Kernel run = nullptr;
    std::vector<unsigned> sizes;
    int static_shared = 0, dynamic_max = 0;  // bytes of shared memory
};
struct Entry {
    std::vector<unsigned> sizes;
    int static_shared;
};
struct Module {
    std::map<std::string, Entry> entries;
    std::map<std::string, Function> functions;
};
typedef std::vector<std::function<int()>> Graph;
struct Stream {
    Device* device;
    bool is_captured = false;
    std::atomic<bool> is_invalid{false};  // its capture
    Graph graph;
};
struct Event {
    Stream* captured_on = nullptr;
    bool is_recorded = false;
};

static thread_local Device* current;
static thread_local int captures;  // streams that this thread captures: others may go on
static Stream& legacy() { static thread_local Stream s{nullptr}; s.device = current; return s; }
static Stream& stream_of(void* s) { return s && s != (void*)1 && s != (void*)2 ? *(Stream*)s : legacy(); }

#define CONTEXT                                                    \
    do {                                                           \
        if (!current) return fail(INVALID_CONTEXT, __func__);      \
        if (int broken = current->broken) return broken;           \
    } while (0)
#define NOT_IN_CAPTURE                                                                    \
    do {                                                                                  \
        if (captures) return fail(CAPTURE_UNSUPPORTED, std::string(__func__) + " in a capture"); \
    } while (0)

API cuCtxSynchronize() {
    CONTEXT;
    ++current->counts[CONTEXT_SYNCS];
    std::lock_guard<std::mutex> guard(current->mutex);
    for (Stream* stream : current->captured) stream->is_invalid = true;
    return current->captured.empty() ? 0 : fail(CAPTURE_UNSUPPORTED, "cuCtxSynchronize beside a capture");
}
// Another thread waits for the whole context while this one captures, where a test wants that.
static void disturb(Device& device, size_t launches) {
    {
        std::lock_guard<std::mutex> guard(device.mutex);
        if (device.disturbed_after < 0 || (long)launches < device.disturbed_after) return;
        device.disturbed_after = -1;
    }
    std::thread([&] { current = &device; cuCtxSynchronize(); }).join();
}
static int enqueue(void* s, std::function<int()> work) {
    Stream& stream = stream_of(s);
    if (int broken = stream.device->broken) return broken;
    if (stream.is_captured) {
        disturb(*stream.device, stream.graph.size());
        if (stream.is_invalid) return fail(CAPTURE_INVALIDATED, "work for a capture that is no more");
        stream.graph.push_back(work);
        return 0;
    }
    return work();
}

// Whether `bytes` from `at` on lie in an allocation.
static bool is_allocated(Device& device, uint64_t at, size_t bytes) {
    std::lock_guard<std::mutex> guard(device.mutex);
    auto next = device.allocations.upper_bound(at);
    if (next == device.allocations.begin()) return false;
    auto found = std::prev(next);
    return at + bytes <= found->first + found->second;
}

API cuInit(unsigned) { return (int)env("FAKE_CUDA_INIT", device_count() > 0 ? 0 : NO_DEVICE); }
API cuDriverGetVersion(int* v) {
    // The library to link with that comes with the toolkit says so everywhere.
    if (env("FAKE_CUDA_INIT", 0) == STUB_LIBRARY) return STUB_LIBRARY;
    *v = (int)env("FAKE_CUDA_DRIVER", 13000);
    return 0;
}
API cuDeviceGetCount(int* n) { *n = device_count(); return 0; }
API cuDeviceGet(int* d, int ordinal) {
    if (ordinal < 0 || ordinal >= device_count()) return INVALID_DEVICE;
    *d = ordinal;
    return 0;
}
API cuDeviceGetName(char* n, int len, int d) { snprintf(n, len, "%s", devices[d].name); return 0; }
API cuDeviceGetPCIBusId(char* bus, int len, int d) {
    snprintf(bus, len, "0000:0%d:00.0", d);
    return 0;
}
API cuDeviceTotalMem_v2(size_t* bytes, int d) { *bytes = devices[d].memory; return 0; }
API cuDeviceGetAttribute(int* v, int attribute, int d) {
    switch (attribute) {
        case 1: *v = 1024; break;             // threads of a block
        case 10: *v = 32; break;              // threads of a warp
        case 16: *v = 4; break;               // multiprocessors
        case 39: *v = devices[d].major == 8 && devices[d].minor ? 1536 : 2048; break;  // its threads
        case 75: *v = devices[d].major; break;
        case 76: *v = devices[d].minor; break;
        case 97: *v = shared_max(devices[d]); break;
        case 115: *v = 1; break;              // memory pools
        default: *v = 0;
    }
    return 0;
}
API cuDevicePrimaryCtxRetain(void** c, int d) {
    *c = &devices[d].context;
    return (int)env("FAKE_CUDA_RETAIN", devices[d].broken);
}
API cuDevicePrimaryCtxRelease_v2(int) { return 0; }
API cuCtxGetCurrent(void** c) { *c = current ? &current->context : nullptr; return 0; }
API cuCtxSetCurrent(void* c) {
    current = nullptr;
    for (Device& d : devices)
        if (&d.context == c) current = &d;
    return 0;
}
API cuGetErrorName(int code, const char** s) {
    static thread_local char text[64];
    snprintf(text, sizeof text, "stand-in error %d", code);
    *s = text;
    return 0;
}
API cuGetErrorString(int code, const char** s) { return cuGetErrorName(code, s); }

API cuStreamCreate(void** s, unsigned) { CONTEXT; *s = new Stream{current}; return 0; }
API cuStreamCreateWithPriority(void** s, unsigned, int) { return cuStreamCreate(s, 0); }
API cuStreamDestroy_v2(void* s) { delete (Stream*)s; return 0; }
API cuStreamSynchronize(void* s) {
    CONTEXT;
    ++current->counts[SYNCS];
    return stream_of(s).is_captured ? fail(CAPTURE_UNSUPPORTED, "cuStreamSynchronize in a capture") : 0;
}
API cuEventCreate(void** e, unsigned) { *e = new Event; return 0; }
API cuEventDestroy_v2(void* e) { delete (Event*)e; return 0; }
API cuEventRecord(void* e, void* s) {
    Event* event = (Event*)e;
    event->is_recorded = true;
    event->captured_on = stream_of(s).is_captured ? &stream_of(s) : nullptr;
    return 0;
}
API cuEventSynchronize(void*) { CONTEXT; return 0; }
API cuEventQuery(void*) { CONTEXT; return 0; }
API cuEventElapsedTime_v2(float* ms, void*, void*) { *ms = 0; return 0; }
API cuStreamWaitEvent(void* s, void* e, unsigned) {
    Event* event = (Event*)e;
    if (stream_of(s).is_captured && event->is_recorded && event->captured_on != &stream_of(s))
        return fail(CAPTURE_ISOLATION, "a capture waits on an event from outside");
    return 0;
}
API cuStreamIsCapturing(void* s, int* status) { *status = stream_of(s).is_captured; return 0; }
API cuStreamBeginCapture_v2(void* s, int) {
    CONTEXT;
    if (&stream_of(s) == &legacy()) return fail(CAPTURE_UNSUPPORTED, "capture on the legacy stream");
    Stream& stream = stream_of(s);
    stream.is_captured = true;
    stream.is_invalid = false;
    stream.graph.clear();
    ++captures;
    std::lock_guard<std::mutex> guard(stream.device->mutex);
    stream.device->captured.push_back(&stream);
    return 0;
}
API cuStreamEndCapture(void* s, void** g) {
    Stream& stream = stream_of(s);
    if (!stream.is_captured) return fail(CAPTURE_INVALIDATED, "end of no capture");
    --captures;
    std::lock_guard<std::mutex> guard(stream.device->mutex);
    auto& all = stream.device->captured;
    all.erase(std::find(all.begin(), all.end(), &stream));
    stream.is_captured = false;
    *g = stream.is_invalid ? nullptr : new Graph(stream.graph);
    return *g ? 0 : fail(CAPTURE_INVALIDATED, "cuStreamEndCapture");
}
API cuGraphInstantiateWithFlags(void** x, void* g, unsigned long long) { *x = new Graph(*(Graph*)g); return 0; }
API cuGraphLaunch(void* x, void* s) {
    CONTEXT;
    ++stream_of(s).device->counts[GRAPH_LAUNCHES];
    for (auto& work : *(Graph*)x) {
        if (current->broken) return 0;  // shows at the next call that waits
        if (int code = work()) return code;
    }
    return 0;
}
API cuGraphUpload(void*, void*) { return 0; }
API cuGraphDestroy(void* g) { delete (Graph*)g; return 0; }
API cuGraphExecDestroy(void* g) { delete (Graph*)g; return 0; }

// What an allocation takes of a device: large ones whole pages, as far as that is known of drivers.
static size_t held(size_t n) {
    const size_t grain = n < 1 << 20 ? 512 : 2 << 20;
    return (n + grain - 1) / grain * grain;
}
API cuMemAlloc_v2(uint64_t* p, size_t n) {
    CONTEXT;
    NOT_IN_CAPTURE;
    Device& device = *current;
    std::lock_guard<std::mutex> guard(device.mutex);
    if (!n) return INVALID_VALUE;
    if (device.used + held(n) > device.memory) return fail(OUT_OF_MEMORY, "cuMemAlloc");
    *p = (uint64_t)aligned_alloc(512, (n + 511) / 512 * 512);
    memset((void*)*p, 0xCD, n);  // what was never written shows
    device.allocations[*p] = n;
    device.used += held(n);
    ++device.counts[ALLOCATIONS];
    return 0;
}
API cuMemFree_v2(uint64_t p) {
    for (Device& device : devices) {
        std::lock_guard<std::mutex> guard(device.mutex);
        auto found = device.allocations.find(p);
        if (found == device.allocations.end()) continue;
        device.used -= held(found->second);
        memset((void*)p, 0xDD, found->second);
        device.allocations.erase(found);
        free((void*)p);
        return device.broken;
    }
    return fail(INVALID_VALUE, "cuMemFree of what is no allocation");
}
API cuMemHostAlloc(void** p, size_t n, unsigned) { CONTEXT; NOT_IN_CAPTURE; *p = malloc(n); return 0; }
API cuMemFreeHost(void* p) { free(p); return 0; }
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    CONTEXT;
    std::lock_guard<std::mutex> guard(current->mutex);
    *total = current->memory;
    *free = current->memory - current->used;
    return 0;
}
API cuMemsetD8Async(uint64_t p, unsigned char c, size_t n, void* s) {
    CONTEXT;
    if (!is_allocated(*current, p, n)) return fail(INVALID_VALUE, "memset outside of an allocation");
    return enqueue(s, [=] { memset((void*)p, c, n); return 0; });
}
API cuMemcpyHtoDAsync_v2(uint64_t d, const void* h, size_t n, void* s) {
    CONTEXT;
    if (!is_allocated(*current, d, n)) return fail(INVALID_VALUE, "copy outside of an allocation");
    ++current->counts[COPIES_TO_DEVICE];
    return enqueue(s, [=] { memcpy((void*)d, h, n); return 0; });
}
API cuMemcpyDtoHAsync_v2(void* h, uint64_t d, size_t n, void* s) {
    CONTEXT;
    if (!is_allocated(*current, d, n)) return fail(INVALID_VALUE, "copy outside of an allocation");
    ++current->counts[COPIES_TO_HOST];
    return enqueue(s, [=] { memcpy(h, (void*)d, n); return 0; });
}
API cuMemcpyDtoDAsync_v2(uint64_t d, uint64_t from, size_t n, void* s) {
    CONTEXT;
    if (!is_allocated(*current, d, n) || !is_allocated(*current, from, n))
        return fail(INVALID_VALUE, "copy outside of an allocation");
    return enqueue(s, [=] { memmove((void*)d, (void*)from, n); return 0; });
}
API cuMemcpyHtoD_v2(uint64_t d, const void* h, size_t n) {
    CONTEXT;
    NOT_IN_CAPTURE;
    if (!is_allocated(*current, d, n)) return fail(INVALID_VALUE, "copy outside of an allocation");
    memcpy((void*)d, h, n);
    return 0;
}

// The bytes of shared memory that a PTX text declares and `body` names. Those without a size are dynamic.
static int static_shared(const std::string& text, const std::string& body) {
    static const std::string WORD = ".shared .align ";
    int bytes = 0;
    for (size_t p = text.find(WORD); p != std::string::npos; p = text.find(WORD, p + 1)) {
        const std::string line = text.substr(p + WORD.size(), text.find(';', p) - p - WORD.size());
        int alignment = 1, bits = 8, end = 0;
        char type = 0, name[256] = "";  // such as `4 .b8 name[64]`, or `4 .f32 name`
        if (sscanf(line.c_str(), "%d .%c%d %255[^[]%n", &alignment, &type, &bits, name, &end) < 4) continue;
        const char* bracket = line.c_str() + end;
        if (!strcmp(bracket, "[]") || body.find(name) == std::string::npos) continue;
        const int count = *bracket ? atoi(bracket + 1) : 1;
        bytes = (bytes + alignment - 1) / alignment * alignment + count * bits / 8;
    }
    return bytes;
}
// Every entry of a PTX text: the sizes of its parameters, and its shared memory.
static Module* parse(const std::string& text) {
    Module* module = new Module;
    size_t p = 0;
    while ((p = text.find(".entry ", p)) != std::string::npos) {
        p += 7;
        const size_t open = text.find('(', p), close = text.find(')', open);
        const std::string name = text.substr(p, open - p), list = text.substr(open, close - open);
        std::vector<unsigned> sizes;
        size_t q = 0;
        while ((q = list.find(".param ", q)) != std::string::npos) {
            q += 7;
            const size_t end = list.find(',', q);
            const std::string one = list.substr(q, end == std::string::npos ? end : end - q);
            const size_t bracket = one.find('[');
            sizes.push_back(bracket != std::string::npos
                                ? atoi(one.c_str() + bracket + 1)  // .align 8 .b8 name[24]
                                : atoi(one.c_str() + one.find_first_of("0123456789")) / 8);  // .u64 name
        }
        const size_t next = text.find(".entry ", close);
        module->entries[name] = {sizes, static_shared(text, text.substr(close, next - close))};
        p = close;
    }
    return module;
}
API cuModuleLoadData(void** m, const void* image) {
    CONTEXT;
    NOT_IN_CAPTURE;
    if (!memcmp(image, "\x7f" "ELF", 4)) return fail(NO_BINARY, "a cubin");
    const std::string text((const char*)image);
    if (text.find(".version 9.0") == std::string::npos) return fail(INVALID_IMAGE, "not PTX 9.0");
    *m = parse(text);
    return 0;
}
// Options 5 and 6 are a log of errors and its bytes.
API cuModuleLoadDataEx(void** m, const void* image, unsigned count, int* options, void** values) {
    char* log = nullptr;
    size_t bytes = 0;
    for (unsigned i = 0; i < count; ++i) {
        if (options[i] == 5) log = (char*)values[i];
        if (options[i] == 6) bytes = (size_t)values[i];
    }
    const int code = (int)env("FAKE_CUDA_JIT", 0);
    if (code == INVALID_PTX && log)
        snprintf(log, bytes, "ptxas application ptx input, line 9; error   : stand-in\n");
    return code ? fail(code, "the compiler") : cuModuleLoadData(m, image);
}
API cuModuleUnload(void* m) { delete (Module*)m; return 0; }

// This library, which the program may have loaded for itself alone.
static void* own_symbol(const std::string& name) {
    static void* const library = [] {
        Dl_info info;
        dladdr((void*)&own_symbol, &info);
        return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
    return dlsym(library, name.c_str());
}
API cuModuleGetFunction(void** f, void* m, const char* name) {
    CONTEXT;
    Module* module = (Module*)m;
    auto entry = module->entries.find(name);
    if (entry == module->entries.end()) return fail(NOT_FOUND, std::string("no entry ") + name);
    Function& function = module->functions[name];
    if (!function.run) {
        function.name = name;
        function.sizes = entry->second.sizes;
        function.static_shared = entry->second.static_shared;
        function.dynamic_max = SHARED_DEFAULT - function.static_shared;
        function.run = (Kernel)own_symbol(std::string("emu_") + name);
        auto sizes = (int (*)(unsigned*))own_symbol(std::string("emu_sizes_") + name);
        if (!function.run || !sizes) return fail(NOT_FOUND, std::string(name) + " has no host build");
        unsigned of_source[64];
        if (std::vector<unsigned>(of_source, of_source + sizes(of_source)) != function.sizes)
            return fail(NOT_FOUND, std::string(name) + ": the PTX is stale");
    }
    *f = &function;
    return 0;
}
API cuFuncGetAttribute(int* value, int attribute, void* f) {
    CONTEXT;
    Function* function = (Function*)f;
    if (attribute != 1 && attribute != 8) return fail(INVALID_VALUE, "an attribute that nobody asked for");
    *value = attribute == 1 ? function->static_shared : function->dynamic_max;
    return 0;
}
API cuFuncSetAttribute(void* f, int attribute, int value) {
    CONTEXT;
    ++current->counts[ATTRIBUTES];
    if (attribute != 8) return 0;
    Function* function = (Function*)f;
    if (value < 0 || function->static_shared + value > shared_max(*current))
        return fail(INVALID_VALUE, function->name + ": more shared memory than a block may have");
    function->dynamic_max = value;
    return 0;
}

// Whether this launch is the one that a test breaks; what cuLaunchKernel then returns.
static bool breaks(Device& device, const std::string& kernel, int& code) {
    std::lock_guard<std::mutex> guard(device.mutex);
    if (device.fails_after < 0 || (!device.fails_at.empty() && device.fails_at != kernel)) return false;
    if (device.fails_after-- > 0) return false;
    code = device.fails_with;
    // What breaks the context shows at the next call that waits.
    if (code != INVALID_VALUE && code != OUT_OF_MEMORY && code != OUT_OF_RESOURCES) {
        device.broken = code;
        code = 0;
    }
    return true;
}
API cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned dynamic, void* s, void** parameters, void**) {
    CONTEXT;
    Function* function = (Function*)f;
    Device& device = *current;
    const std::string& name = function->name;
    ++device.counts[LAUNCHES];
    if (!gx || !gy || !gz || gx > 0x7fffffffu || gy > 65535 || gz > 65535 || !bx || !by || !bz ||
        bx * by * bz > 1024 || bz > 64)
        return fail(INVALID_VALUE, name + ": launch configuration");
    if ((int)dynamic > function->dynamic_max) return fail(INVALID_VALUE, name + ": dynamic shared memory");
    const bool is_captured = stream_of(s).is_captured;
    int code;
    if (!is_captured && breaks(device, name, code)) return code;
    std::vector<std::vector<char>> values;
    for (size_t i = 0; i < function->sizes.size(); ++i) {
        const char* value = (const char*)parameters[i];
        values.emplace_back(value, value + function->sizes[i]);
        // Eight bytes are a pointer, or a count, which is small.
        uint64_t pointer = 0;
        if (function->sizes[i] == 8) memcpy(&pointer, value, 8);
        if (pointer >> 32 && !is_allocated(device, pointer, 1))
            return fail(INVALID_VALUE, name + ": parameter " + std::to_string(i) + " points nowhere");
    }
    const uint64_t seed = (uint64_t)env("FAKE_CUDA_SEED", 0);
    return enqueue(s, [=, &device]() mutable {
        int code;
        if (is_captured && breaks(device, function->name, code)) return code;
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(value.data());
        unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        char error[400] = "";
        if (function->run(grid, block, dynamic, seed, pointers.data(), error, sizeof error)) {
            fprintf(stderr, "fake-cuda: %s: %s\n", function->name.c_str(), error);
            return (int)(device.broken = LAUNCH_FAILED);
        }
        return 0;
    });
}

// The launch of `kernel` (any where it is empty) after `after` others fails with `code`.
API fake_cuda_fail(int device, const char* kernel, int after, int code) {
    std::lock_guard<std::mutex> guard(devices[device].mutex);
    devices[device].fails_at = kernel;
    devices[device].fails_with = code;
    devices[device].fails_after = after;
    return 0;
}
// The next capture that has so many launches is disturbed: another thread synchronises the context.
API fake_cuda_disturb(int device, int launches) {
    std::lock_guard<std::mutex> guard(devices[device].mutex);
    devices[device].disturbed_after = launches;
    return 0;
}
// From now on the device has `bytes` more than are in use.
API fake_cuda_leave(int device, size_t bytes) {
    std::lock_guard<std::mutex> guard(devices[device].mutex);
    devices[device].memory = devices[device].used + bytes;
    return 0;
}
// A counter of the device (enum Counter).
API fake_cuda_count(int device, int counter) { return (int)devices[device].counts[counter]; }
