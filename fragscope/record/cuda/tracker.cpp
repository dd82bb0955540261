// Writes every event of PyTorch's CUDA caching allocator, and what the recorder notes between them, into chunk files.
//
// The allocator calls the tracker under its own lock, on the thread that asked for memory, in the order in which things
// happen; no Python runs here. Chunks are mapped files whose header counts the records that are complete, so that what
// was written stays readable when the process is killed. Their layout is read by fragscope/trace/chunks.py.
//
// Built for the installed torch when it is first wanted (fragscope/record/cuda/native.py); needs c10's headers only.

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/util/ApproximateClock.h>

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>

namespace {

using c10::cuda::CUDACachingAllocator::TraceEntry;

struct Record {
  uint8_t kind;
  uint8_t device;
  uint16_t unused;
  uint32_t thread;
  int64_t addr;
  int64_t size;
  int64_t stream;
  int64_t pool_first;
  int64_t pool_second;
  int64_t clock;  // of c10's approximate clock; headers tell what time it was at some of its readings
  int64_t text;
};
static_assert(sizeof(Record) == 64, "chunks.py reads records of 64 bytes");

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t record_bytes;
  uint64_t capacity;
  uint64_t first;  // number of the first record in the whole recording
  std::atomic<uint64_t> count;
  int64_t clock;  // two clocks read at once, when the chunk was opened
  int64_t time_us;
  char unused[8];
};
static_assert(sizeof(Header) == 64, "chunks.py reads headers of 64 bytes");

constexpr char kMagic[8] = {'F', 'S', 'C', 'H', 'U', 'N', 'K', '\0'};
constexpr uint32_t kVersion = 1;

std::mutex mutex;
bool attached = false;
bool recording = false;
std::string folder;
uint64_t capacity = 0;
int chunk = 0;
Header* header = nullptr;
Record* records = nullptr;
size_t mapped_bytes = 0;
uint64_t total = 0;
uint64_t lost = 0;
uint64_t most_chunks = 0;
int failure = 0;
uint64_t events_of[64];

int64_t now_us() {
  timespec t{};
  clock_gettime(CLOCK_REALTIME, &t);
  return int64_t(t.tv_sec) * 1000000 + t.tv_nsec / 1000;
}

uint32_t thread_number() {
  thread_local const auto number = static_cast<uint32_t>(syscall(SYS_gettid));
  return number;
}

void unmap() {
  if (header != nullptr) munmap(header, mapped_bytes);
  header = nullptr;
  records = nullptr;
}

// The next chunk file; false, with the reason in `failure`, where the disk does not give it.
bool open_chunk() {
  unmap();
  if (most_chunks != 0 && static_cast<uint64_t>(chunk) >= most_chunks) {
    failure = EFBIG;
    return false;
  }
  char name[32];
  std::snprintf(name, sizeof name, "/events-%06d.bin", chunk + 1);
  const std::string path = folder + name;
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) {
    failure = errno;
    return false;
  }
  mapped_bytes = sizeof(Header) + capacity * sizeof(Record);
  // Space is taken now: writing to a mapped hole of a full disk would kill the program.
  failure = posix_fallocate(file, 0, static_cast<off_t>(mapped_bytes));
  void* start = MAP_FAILED;
  if (failure == 0) {
    start = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
    if (start == MAP_FAILED) failure = errno;
  }
  close(file);
  if (start == MAP_FAILED) {
    unlink(path.c_str());
    return false;
  }
  madvise(start, mapped_bytes, MADV_DONTFORK);  // a forked child must not write into its parent's recording
  ++chunk;
  header = static_cast<Header*>(start);
  records = reinterpret_cast<Record*>(header + 1);
  std::memcpy(header->magic, kMagic, sizeof kMagic);
  header->version = kVersion;
  header->record_bytes = sizeof(Record);
  header->capacity = capacity;
  header->first = total;
  header->clock = static_cast<int64_t>(c10::getApproximateTime());
  header->time_us = now_us();
  header->count.store(0, std::memory_order_release);
  return true;
}

void put(const Record& record) {
  if (failure != 0 || (header->count.load(std::memory_order_relaxed) == capacity && !open_chunk())) {
    ++lost;
    return;
  }
  const uint64_t at = header->count.load(std::memory_order_relaxed);
  records[at] = record;
  header->count.store(at + 1, std::memory_order_release);
  ++total;
}

// Numbers of chunks.py's EventKind; 0 is not recorded.
uint8_t kind_of(TraceEntry::Action action) {
  switch (action) {
    case TraceEntry::ALLOC: return 1;
    case TraceEntry::FREE_REQUESTED: return 2;
    case TraceEntry::FREE_COMPLETED: return 3;
    case TraceEntry::SEGMENT_ALLOC: return 4;
    case TraceEntry::SEGMENT_FREE: return 5;
    case TraceEntry::SEGMENT_MAP: return 6;
    case TraceEntry::SEGMENT_UNMAP: return 7;
    case TraceEntry::OOM: return 8;
    case TraceEntry::SNAPSHOT: return 9;
    default: return 255;  // of a newer release; counted as unknown by the reader
  }
}

void track(const TraceEntry& entry) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!recording) return;
  Record record{};
  record.kind = kind_of(entry.action_);
  record.device = static_cast<uint8_t>(entry.device_);
  record.thread = thread_number();
  record.addr = static_cast<int64_t>(entry.addr_);
  record.size = static_cast<int64_t>(entry.size_);
  record.stream = reinterpret_cast<int64_t>(entry.stream_);
  record.pool_first = static_cast<int64_t>(entry.mempool_.first);
  record.pool_second = static_cast<int64_t>(entry.mempool_.second);
  record.clock = static_cast<int64_t>(entry.time_.approx_t_);
  record.text = -1;
  ++events_of[record.device & 63];
  put(record);
}

void stop_in_child() {
  recording = false;
  header = nullptr;  // not mapped here (MADV_DONTFORK)
  records = nullptr;
}

}  // namespace

extern "C" {

// Begins to write chunks of `records` records into `path`, at most `chunks` of them (0: no limit). 0, or an errno.
int fragscope_start(const char* path, uint64_t records_per_chunk, uint64_t chunks) {
  if (!attached) {
    // The allocator must exist; a tracker can not be detached, and costs a test of a flag when nothing is recorded.
    try {
      c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(track);
    } catch (const std::exception&) {
      return ENOSYS;  // another allocator (cudaMallocAsync, a pluggable one)
    }
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); stop_in_child(); });
    attached = true;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (recording) return EBUSY;
  folder = path;
  capacity = records_per_chunk;
  most_chunks = chunks;
  chunk = 0;
  total = 0;
  lost = 0;
  failure = 0;
  std::memset(events_of, 0, sizeof events_of);
  if (!open_chunk()) return failure;
  recording = true;
  return 0;
}

// Notes something between the allocator's events; returns its number in the recording.
int64_t fragscope_note(uint8_t kind, uint8_t device, int64_t addr, int64_t size, int64_t stream, int64_t pool_first,
                       int64_t pool_second, int64_t text) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!recording) return -1;
  Record record{};
  record.kind = kind;
  record.device = device;
  record.thread = thread_number();
  record.addr = addr;
  record.size = size;
  record.stream = stream;
  record.pool_first = pool_first;
  record.pool_second = pool_second;
  record.clock = static_cast<int64_t>(c10::getApproximateTime());
  record.text = text;
  put(record);
  return static_cast<int64_t>(total);
}

// Ends the recording; the last chunk keeps only what was written.
void fragscope_stop() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!recording) return;
  recording = false;
  if (header == nullptr) return;
  const auto used = sizeof(Header) + header->count.load() * sizeof(Record);
  unmap();
  char name[32];
  std::snprintf(name, sizeof name, "/events-%06d.bin", chunk);
  (void)!truncate((folder + name).c_str(), static_cast<off_t>(used));
}

// Records written, records lost, and the errno that ended the writing (0: none).
void fragscope_status(uint64_t* written, uint64_t* missed, int* error) {
  const std::lock_guard<std::mutex> lock(mutex);
  *written = total;
  *missed = lost;
  *error = failure;
}

// Events of one device so far, lost ones included.
uint64_t fragscope_events(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  return events_of[device & 63];
}
}
