#include "common/amx.h"

#ifdef LORUN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lorun {

#ifdef LORUN_AMX
namespace {

bool detect() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned int kBf16 = 1u << 22, kTile = 1u << 24;
  // LORUN_CPU asks for vectors, and a machine without tiles.
  if (active_variant() != CpuVariant::kAvx512 || asks_for_variant() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) ||
      (d & kBf16) == 0 || (d & kTile) == 0) {
    return false;
  }
  // Linux hands out the tiles' state on request, to all threads of the process at once.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
#endif

bool has_amx() {
#ifdef LORUN_AMX
  static const bool found = detect();
  return found;
#else
  return false;
#endif
}

}  // namespace lorun
