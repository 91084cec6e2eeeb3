// A stand-in for libnvidia-ml.so.1 beside that for the driver (scripts/cuda-check): cards that draw
// 100 watts since the library was loaded. fake_nvml_say sets what tests want to be told.
#include <atomic>
#include <chrono>
#include <cstring>

#define API extern "C" __attribute__((visibility("default"))) int

enum { INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

static const auto start = std::chrono::steady_clock::now();
static std::atomic<unsigned> used{0};             // per cent
static std::atomic<unsigned long long> hot{0};    // nanoseconds
static std::atomic<bool> counts_energy{true};

API nvmlInit_v2() { return 0; }
API nvmlShutdown() { return 0; }
API nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** device) {
    static char card;
    // As the driver's stand-in places cards.
    if (strncmp(bus, "0000:0", 6) != 0 || strcmp(bus + 7, ":00.0") != 0) return NOT_FOUND;
    *device = &card;
    return 0;
}
API nvmlDeviceGetTotalEnergyConsumption(void*, unsigned long long* millijoules) {
    if (!counts_energy) return NOT_SUPPORTED;
    const std::chrono::duration<double> since = std::chrono::steady_clock::now() - start;
    *millijoules = (unsigned long long)(100e3 * since.count());
    return 0;
}
API nvmlDeviceGetUtilizationRates(void*, unsigned (*rates)[2]) {
    (*rates)[0] = used;
    (*rates)[1] = 0;
    return 0;
}
API nvmlDeviceGetViolationStatus(void*, int policy, unsigned long long (*times)[2]) {
    if (policy != 1 && policy != 3) return NOT_SUPPORTED;
    (*times)[0] = 0;
    (*times)[1] = policy == 1 ? hot.load() : 0;
    return 0;
}
API fake_nvml_say(unsigned per_cent, unsigned long long nanoseconds, int energy) {
    used = per_cent;
    hot = nanoseconds;
    counts_energy = energy != 0;
    return 0;
}
