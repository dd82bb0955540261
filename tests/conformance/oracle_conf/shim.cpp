// The conf of a release's own libc10_cuda.so, as a C interface: what it accepts and which settings are then in force.
// Built by conf_against_binary.py against the headers of the release; needs no device.

// The accessors of 2.10 and newer that this file shares with 2.9 are marked deprecated.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#define PYTORCH_C10_DRIVER_API_SUPPORTED 1  // as the wheels are built; without it expandable_segments() is always false
#include <c10/cuda/CUDAAllocatorConfig.h>

#include <cstdio>
#include <exception>
#include <string>
#if __has_include(<c10/core/AllocatorConfig.h>)
#include <c10/core/AllocatorConfig.h>
#endif

using c10::cuda::CUDACachingAllocator::CUDAAllocatorConfig;
#if RELEASE >= 210
using Config = c10::CachingAllocator::AcceleratorAllocatorConfig;
#else
using Config = CUDAAllocatorConfig;
#endif

static std::string answer;

extern "C" {

// Settings in force, one line of numbers; also what first reads the environment. An error's text begins with '!'.
const char* conf_values() {
  try {
    char line[256];
    size_t segment = 20971520;
    double fraction = 1.0;
    int refuse = 0;
#if RELEASE >= 210
    fraction = CUDAAllocatorConfig::per_process_memory_fraction();
#endif
#if RELEASE >= 211
    segment = Config::large_segment_size();
#endif
#if RELEASE >= 212
    refuse = CUDAAllocatorConfig::throw_on_cudamalloc_oom();
#endif
    std::snprintf(
        line,
        sizeof line,
        "%zu %zu %zu %.17g %.17g %d %d %d",
        Config::max_split_size(),
        CUDAAllocatorConfig::max_non_split_rounding_size(),
        segment,
        Config::garbage_collection_threshold(),
        fraction,
        CUDAAllocatorConfig::expandable_segments() ? 1 : 0,
        refuse,
        CUDAAllocatorConfig::graph_capture_record_stream_reuse() ? 1 : 0);
    answer = line;
    for (size_t i = 0; i < 16; ++i) {
      answer += ' ' + std::to_string(Config::roundup_power2_divisions(size_t{1} << (20 + i)));
    }
  } catch (const std::exception& error) {
    answer = std::string("!") + error.what();
  }
  return answer.c_str();
}

// As conf_values, after the settings were changed by a string.
const char* conf_set(const char* text) {
  try {
    c10::cuda::CUDACachingAllocator::setAllocatorSettings(text);
  } catch (const std::exception& error) {
    answer = std::string("!") + error.what();
    return answer.c_str();
  }
  return conf_values();
}
}
