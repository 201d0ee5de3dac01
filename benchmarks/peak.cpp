// Byte dot products from registers alone, on every thread: the ceiling of any INT8 GEMM on this CPU.
// For benchmarks/ceilings.py: g++ -O2 -shared -fPIC -o peak.so peak.cpp -lpthread
#include <chrono>
#include <thread>
#include <vector>

namespace {

// 24 sums, far more than the instruction's latency needs, some 50 million times.
#define DOT(sum) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #sum "\n"
__attribute__((target("avx512vnni"))) void dots(long rounds) {
  // clang-format off
  for (long i = 0; i < rounds; ++i)
    asm volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11) DOT(12)
                 DOT(13) DOT(14) DOT(15) DOT(16) DOT(17) DOT(18) DOT(19) DOT(20) DOT(21) DOT(22) DOT(23)
                 ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                     "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
  // clang-format on
}

}  // namespace

// 10^12 multiplications and additions a second, or 0 on a CPU without AVX-512 VNNI.
extern "C" double int8_tops(int threads) {
  if (!__builtin_cpu_supports("avx512vnni")) return 0;
  const long rounds = 2000000;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back(dots, rounds);
  for (auto& t : all) t.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return threads * rounds * 24 * 64 * 2 / seconds.count() / 1e12;
}
