// The allocator's C++ API as plain C functions, for one torch release: the one whose headers it is built with.
//
// A function that can fail returns -1 and leaves the reason for oracle_error(). Arrays that are handed out stay valid
// until the next call of the same function.

#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#if __has_include(<c10/cuda/PeerToPeerAccess.h>)
#include <c10/cuda/PeerToPeerAccess.h>
#define HAS_PEER_ACCESS_CACHE
#endif

#include <array>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace c10::cuda::_internal {
void setHasPrimaryContext(bool (*func)(c10::DeviceIndex));  // what torch's CUDA hooks do when they are loaded
}

namespace {

using namespace c10::cuda;
using namespace c10::cuda::CUDACachingAllocator;
using PoolId = decltype(TraceEntry::mempool_);  // its namespace moved between releases

struct Entry {
  uint64_t action, addr, size, stream, pool;
};

// Actions in the order in which the Python side names them; -1 for what the allocator's state does not depend on.
int number_of(TraceEntry::Action action) {
  switch (action) {
    case TraceEntry::ALLOC: return 0;
    case TraceEntry::FREE_REQUESTED: return 1;
    case TraceEntry::FREE_COMPLETED: return 2;
    case TraceEntry::SEGMENT_ALLOC: return 3;
    case TraceEntry::SEGMENT_FREE: return 4;
    case TraceEntry::SEGMENT_MAP: return 5;
    case TraceEntry::SEGMENT_UNMAP: return 6;
    case TraceEntry::OOM: return 7;
    default: return -1;
  }
}

std::string error;
std::vector<Entry> entries, taken;
std::vector<int64_t> counters;
std::vector<uint64_t> layout;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return -1;
  }
}

uint64_t number(const void* stream) {
  return reinterpret_cast<uint64_t>(stream);
}

PoolId pool_id(uint64_t pool) {
  return {0, pool};  // pools made by a program, as opposed to those of graphs
}

// Setters that came, or changed, between releases.

template <typename Allocator>
void use_on_oom(Allocator* allocator, uint64_t pool) {
  if constexpr (requires { allocator->setUseOnOOM(0, pool_id(pool), true); }) {
    allocator->setUseOnOOM(0, pool_id(pool), true);
  } else {
    allocator->setUseOnOOM(0, pool_id(pool));
  }
}

template <typename Allocator>
void no_split(Allocator* allocator, uint64_t pool) {
  if constexpr (requires { allocator->setNoSplit(0, pool_id(pool)); }) {
    allocator->setNoSplit(0, pool_id(pool));
  } else {
    throw std::runtime_error("this release has no setNoSplit");
  }
}

template <typename Stat>
void add(const Stat& stat) {
  counters.insert(counters.end(), {stat.current, stat.peak, stat.allocated, stat.freed});
}

}  // namespace

extern "C" {

const char* oracle_error() {
  return error.c_str();
}

// Once a process, before anything else.
int oracle_start(const char* conf) {
  return guarded([&] {
    setAllocatorSettings(conf);
    get()->init(1);
#ifdef HAS_PEER_ACCESS_CACHE
    c10::cuda::detail::init_p2p_access_cache(1);
#endif
    c10::cuda::_internal::setHasPrimaryContext([](c10::DeviceIndex) { return true; });
    get()->attachAllocatorTraceTracker([](const TraceEntry& e) {
      if (int action = number_of(e.action_); action >= 0) {
        entries.push_back({static_cast<uint64_t>(action), e.addr_, e.size_, number(e.stream_), e.mempool_.second});
      }
    });
  });
}

// 1: served; 0: out of memory.
int oracle_malloc(uint64_t size, uint64_t stream, uint64_t* addr) {
  bool served = true;
  int failed = guarded([&] {
    try {
      void* pointer = get()->raw_alloc_with_stream(size, reinterpret_cast<cudaStream_t>(stream));
      *addr = reinterpret_cast<uint64_t>(pointer);
    } catch (const c10::OutOfMemoryError&) {
      served = false;
    }
  });
  return failed ? -1 : served;
}

int oracle_free(uint64_t addr) {
  return guarded([&] { get()->raw_delete(reinterpret_cast<void*>(addr)); });
}

int oracle_record_stream(uint64_t addr, uint64_t stream) {
  return guarded([&] {
    void* pointer = reinterpret_cast<void*>(addr);
    c10::DataPtr data(pointer, pointer, get()->raw_deleter(), c10::Device(c10::DeviceType::CUDA, 0));
    get()->recordStream(data, getStreamFromExternal(reinterpret_cast<cudaStream_t>(stream), 0));
    data.release_context();
  });
}

int oracle_empty_cache(uint64_t pool) {
  return guarded([&] { get()->emptyCache(pool_id(pool)); });
}

int oracle_set_conf(const char* conf) {
  return guarded([&] { setAllocatorSettings(conf); });
}

int oracle_set_memory_fraction(double fraction) {
  return guarded([&] { get()->setMemoryFraction(fraction, 0); });
}

int oracle_create_pool(uint64_t pool, int on_oom, int unsplit) {
  return guarded([&] {
    get()->createOrIncrefPool(0, pool_id(pool));
    if (on_oom) use_on_oom(get(), pool);
    if (unsplit) no_split(get(), pool);
  });
}

int oracle_begin_pool(uint64_t pool) {
  return guarded([&] { get()->beginAllocateToPool(0, pool_id(pool), [](cudaStream_t) { return true; }); });
}

int oracle_end_pool(uint64_t pool) {
  return guarded([&] { get()->endAllocateToPool(0, pool_id(pool)); });
}

int oracle_release_pool(uint64_t pool) {
  return guarded([&] { get()->releasePool(0, pool_id(pool)); });
}

// Trace entries since the last call.
uint64_t oracle_take_entries(const Entry** out) {
  taken.swap(entries);
  entries.clear();
  *out = taken.data();
  return taken.size();
}

// In the order that the Python side names.
uint64_t oracle_counters(const int64_t** out) {
  auto stats = get()->getDeviceStats(0);
  counters.clear();
  for (const auto* group :
       {&stats.allocation, &stats.segment, &stats.active, &stats.inactive_split, &stats.allocated_bytes,
        &stats.reserved_bytes, &stats.active_bytes, &stats.inactive_split_bytes, &stats.requested_bytes}) {
    for (const auto& stat : *group) add(stat);  // all, small, large
  }
  add(stats.oversize_allocations);
  add(stats.oversize_segments);
  counters.insert(
      counters.end(),
      {stats.num_alloc_retries, stats.num_ooms, stats.num_sync_all_streams, stats.num_device_alloc,
       stats.num_device_free});
  *out = counters.data();
  return counters.size();
}

// For each segment: address, bytes, stream, pool, expandable, number of blocks; then for each of its blocks: bytes,
// allocated, active.
uint64_t oracle_segments(const uint64_t** out) {
  layout.clear();
  for (const auto& segment : get()->snapshot().segments) {
    layout.insert(
        layout.end(),
        {segment.address, segment.total_size, number(segment.stream), segment.owner_private_pool_id.second,
         segment.is_expandable, segment.blocks.size()});
    for (const auto& block : segment.blocks) {
      layout.insert(layout.end(), {block.size, uint64_t{block.allocated}, uint64_t{block.active}});
    }
  }
  *out = layout.data();
  return layout.size();
}

}  // extern "C"
