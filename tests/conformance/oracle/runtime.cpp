// A CUDA runtime without a GPU: what the caching allocator of a torch release calls, with a device of a given size.
//
// Device memory is only counted, in pages of 2 MiB, so that a request fails when the capacity is used up. Addresses
// are given out but nothing is behind them. An event is finished when the program says that its stream is, or when
// somebody waits for it. Calls that the allocator links but does not make are filled in by the build (they abort).

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string_view>

namespace {

constexpr uint64_t kPage = 2ull << 20;
constexpr uint64_t kAscendingBase = 0x7f00'0000'0000;
constexpr uint64_t kScatteredBase = 0x7000'0000'0000;
constexpr uint64_t kScatteredPages = 1ull << 22;
constexpr uint64_t kReservedBase = 0x1000'0000'0000;
constexpr uint64_t kReservedEnd = kScatteredBase;

uint64_t pages_of(uint64_t size) {
  return (size + kPage - 1) / kPage * kPage;
}

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "fake CUDA runtime: %s\n", what);
  std::abort();
}

// Addresses that cudaMalloc gives. A freed range is given again, whole, to the next request of its size, lowest first.
struct AddressSpace {
  uint64_t seed = 0;  // 0: ascending; else scattered
  uint64_t next = kAscendingBase;
  std::map<uint64_t, uint64_t> ranges;  // every range ever given, address -> bytes
  std::map<uint64_t, std::set<uint64_t>> idle;  // bytes -> addresses

  uint64_t random() {  // splitmix64
    uint64_t z = (seed += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  bool untouched(uint64_t addr, uint64_t size) const {
    auto after = ranges.lower_bound(addr + size);
    if (after == ranges.begin()) return true;
    --after;
    return after->first + after->second <= addr;
  }

  uint64_t take(uint64_t size) {
    if (auto same = idle.find(size); same != idle.end() && !same->second.empty()) {
      uint64_t addr = *same->second.begin();
      same->second.erase(same->second.begin());
      return addr;
    }
    uint64_t addr = next;
    if (seed != 0) {
      do {
        addr = kScatteredBase + random() % kScatteredPages * kPage;
      } while (!untouched(addr, size));
    } else {
      next += size;
    }
    ranges[addr] = size;
    return addr;
  }
};

struct Stream {
  uint64_t recorded = 0;  // number of the newest event
  uint64_t finished = 0;  // number of the newest event that is finished
};

struct Event {
  cudaStream_t stream = nullptr;
  uint64_t number = 0;
};

uint64_t total = 0;
uint64_t capacity = 0;
uint64_t used = 0;
AddressSpace space;
std::map<uint64_t, uint64_t> given;  // live cudaMalloc ranges, address -> bytes
std::map<uint64_t, uint64_t> physical;  // live cuMemCreate handles -> bytes
uint64_t handles = 0;
uint64_t reserved_to = kReservedBase;
std::map<cudaStream_t, Stream> streams;
cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

bool take_memory(uint64_t size) {
  if (used + size > capacity) return false;
  used += size;
  return true;
}

// Virtual memory management, looked up by name through the runtime.

CUresult reserve_addresses(CUdeviceptr* out, size_t size, size_t, CUdeviceptr, unsigned long long) {
  // Ascending, as a reservation whose first mapping fails leaves no trace of where it is.
  if (space.seed != 0) reserved_to += space.random() % 64 * kPage;
  *out = reserved_to;
  reserved_to += pages_of(size) + kPage;
  if (reserved_to > kReservedEnd) die("no addresses left to reserve");
  return CUDA_SUCCESS;
}

CUresult create_memory(CUmemGenericAllocationHandle* out, size_t size, const CUmemAllocationProp*, unsigned long long) {
  if (size % kPage != 0) die("cuMemCreate of a size that is not a multiple of the granularity");
  if (!take_memory(size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = ++handles;
  physical[handles] = size;
  return CUDA_SUCCESS;
}

CUresult release_memory(CUmemGenericAllocationHandle handle) {
  auto it = physical.find(handle);
  if (it == physical.end()) die("cuMemRelease of an unknown handle");
  used -= it->second;
  physical.erase(it);
  return CUDA_SUCCESS;
}

CUresult attribute(int* out, CUdevice_attribute, CUdevice) {
  *out = 0;  // neither fabric handles nor anything else
  return CUDA_SUCCESS;
}

CUresult current_context(CUcontext* out) {
  *out = reinterpret_cast<CUcontext>(1);
  return CUDA_SUCCESS;
}

CUresult error_text(CUresult, const char** out) {
  *out = "error of the fake driver";
  return CUDA_SUCCESS;
}

CUresult succeed() {
  return CUDA_SUCCESS;  // mapping, access rights: nothing to keep
}

void* driver_function(std::string_view name) {
  if (name == "cuMemAddressReserve") return reinterpret_cast<void*>(reserve_addresses);
  if (name == "cuMemCreate") return reinterpret_cast<void*>(create_memory);
  if (name == "cuMemRelease") return reinterpret_cast<void*>(release_memory);
  if (name == "cuDeviceGetAttribute") return reinterpret_cast<void*>(attribute);
  if (name == "cuCtxGetCurrent") return reinterpret_cast<void*>(current_context);
  if (name == "cuGetErrorString") return reinterpret_cast<void*>(error_text);
  return reinterpret_cast<void*>(succeed);
}

}  // namespace

extern "C" {

// The harness's side.

void runtime_configure(uint64_t total_bytes, uint64_t capacity_bytes, uint64_t seed) {
  total = total_bytes;
  capacity = capacity_bytes;
  space.seed = seed;
}

void runtime_finish_stream(uint64_t handle) {
  Stream& stream = streams[reinterpret_cast<cudaStream_t>(handle)];
  stream.finished = stream.recorded;
}

// The allocator's side: memory.

cudaError_t cudaMalloc(void** out, size_t size) {
  uint64_t bytes = pages_of(size);
  *out = nullptr;
  if (!take_memory(bytes)) return failed(cudaErrorMemoryAllocation);
  uint64_t addr = space.take(bytes);
  given[addr] = bytes;
  *out = reinterpret_cast<void*>(addr);
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  auto it = given.find(reinterpret_cast<uint64_t>(pointer));
  if (it == given.end()) die("cudaFree of an address that cudaMalloc did not give");
  used -= it->second;
  space.idle[it->second].insert(it->first);
  given.erase(it);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* all) {
  *free = capacity - used;
  *all = total;
  return cudaSuccess;
}

// Streams and events.

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *reinterpret_cast<Event*>(event) = {stream, ++streams[stream].recorded};
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Event& event = *reinterpret_cast<Event*>(handle);
  return streams[event.stream].finished >= event.number ? cudaSuccess : failed(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Event& event = *reinterpret_cast<Event*>(handle);
  Stream& stream = streams[event.stream];
  if (stream.finished < event.number) stream.finished = event.number;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;  // called before unmapping; does not finish the events that the program holds back
}

cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// The headers of CUDA 12 give two functions the names of their second versions, as they do in the allocator.

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
    const cudaGraphEdgeData**, size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
    size_t*) {
#endif
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

// The device.

cudaError_t cudaGetDeviceCount(int* out) {
  *out = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* out) {
  *out = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  *out = {};
  std::strcpy(out->name, "fake");
  out->totalGlobalMem = total;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* out) {
  *out = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** out, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  *out = driver_function(name);
  return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(
    const char* name, void** out, unsigned long long flags, cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, out, CUDART_VERSION, flags, result);
}
#endif

// Errors.

cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t) {
  return "error of the fake CUDA runtime";
}

const char* cudaGetErrorName(cudaError_t) {
  return "fakeCudaError";
}

}  // extern "C"
