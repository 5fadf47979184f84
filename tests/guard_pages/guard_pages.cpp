// For LD_PRELOAD: every aligned block that a process asks for, as torch does for tensors and csrc/common/scratch.h for
// work space, lies against memory that nobody may touch, and is not used again once it is freed. So a kernel that
// reads or writes outside its tensors ends the process, whichever instruction does it: also those that no sanitizer
// sees, and in the build that users have.
//
// LORUN_GUARD=end: the block ends where its pages end, aligned to no more than its size is, as a slice might lie.
// LORUN_GUARD=begin: it begins where they begin. New blocks are full of NaN.

#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr std::size_t kPage = 4096, kAddresses = std::size_t{1} << 41;

std::size_t up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

void* reserve(std::size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) {
    std::abort();
  }
  return at;
}

// Addresses are handed out once, each block's pages with one page after them that stays closed.
struct Addresses {
  char* const base = static_cast<char*>(reserve(kAddresses, PROT_NONE));
  uint32_t* const pages = static_cast<uint32_t*>(reserve(kAddresses / kPage * 4, PROT_READ | PROT_WRITE));
  std::atomic<std::size_t> next = kPage;
  const bool at_end = std::getenv("LORUN_GUARD") == nullptr || std::strcmp(std::getenv("LORUN_GUARD"), "begin") != 0;

  bool holds(const void* p) const {
    return p >= base && p < base + kAddresses;
  }

  std::size_t index(const void* p) const {
    return (static_cast<const char*>(p) - base) / kPage;
  }

  void* allocate(std::size_t alignment, std::size_t bytes) {
    const std::size_t room = up(bytes == 0 ? 1 : bytes, kPage), apart = alignment > kPage ? alignment : kPage;
    const std::size_t claimed = room + kPage + (apart - kPage);
    char* at = base + next.fetch_add(claimed);
    at = base + up(at - base, apart);
    if (at + room > base + kAddresses || mprotect(at, room, PROT_READ | PROT_WRITE) != 0) {
      return nullptr;
    }
    pages[index(at)] = static_cast<uint32_t>(room / kPage);
    std::memset(at, 0xff, room);
    return at_end ? at + (room - up(bytes, alignment)) : at;
  }

  void release(void* p) {
    const std::size_t first = index(p);
    char* at = base + first * kPage;
    madvise(at, pages[first] * kPage, MADV_DONTNEED);
    mprotect(at, pages[first] * kPage, PROT_NONE);
  }
};

Addresses& addresses() {
  static Addresses all;
  return all;
}

// What the alignment of so many bytes can be at most where they end with a page.
std::size_t natural(std::size_t bytes, std::size_t most) {
  const std::size_t lowest = bytes & -bytes;
  return lowest == 0 || lowest > most ? most : lowest;
}

template <class F>
F* next_of(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

// Of torch's allocator.
int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) {
  Addresses& all = addresses();
  *out = all.allocate(all.at_end ? natural(bytes, alignment) : alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}

// Of operator new with an alignment, which compiled code relies on.
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  return addresses().allocate(alignment, bytes);
}

void free(void* p) {
  static auto* const own = next_of<void(void*)>("free");
  if (addresses().holds(p)) {
    addresses().release(p);
  } else {
    own(p);
  }
}

void* realloc(void* p, std::size_t bytes) {
  static auto* const own = next_of<void*(void*, std::size_t)>("realloc");
  if (!addresses().holds(p)) {
    return own(p, bytes);
  }
  std::abort();  // nobody does it to aligned blocks
}
}
