// The quantization kernels on the host emulation, for tests/ops/test_cuda_quant.py.
#include "quant.cuh"

namespace {

template <class Source>
void run(const Source& source, const quant::Groups& groups, int items, int threads, int8_t* codes, float* scales,
         unsigned rows, uint64_t seed) {
  emulate::launch({rows}, unsigned(threads), size_t(groups.shared_bytes(Source::kNorm)), seed, [&] {
    items == 1 ? quant::quantize<Source, 1>(source, groups, codes, scales)
               : quant::quantize<Source, 4>(source, groups, codes, scales);
  });
}

template <class T>
void with_number(char source, const void* x, void* residual, const void* gain, float epsilon, int8_t* codes,
                 float* scales, int rows, int channels, int group, int items, int threads, uint64_t seed) {
  const quant::Groups groups(channels, group);
  const auto go = [&](auto made) {
    if (!items) {
      const quant::Plan plan(rows, groups.vectors, quant::kMaxThreads<decltype(made)>);
      items = plan.items, threads = plan.threads;
    }
    run(made, groups, items, threads, codes, scales, unsigned(rows), seed);
  };
  const T* from = static_cast<const T*>(x);
  if (source == 'p') go(quant::Plain<T>{from});
  if (source == 's') go(quant::SiluMul<T>{from});
  if (source == 'r') go(quant::RmsNorm<T>{from, static_cast<T*>(residual), static_cast<const T*>(gain), epsilon});
}

}  // namespace

// With 0 items, the shape of the launch is the ops' own. Returns null, or what went wrong.
extern "C" const char* quantize(char source, char number, const void* x, void* residual, const void* gain,
                                float epsilon, int8_t* codes, float* scales, int rows, int channels, int group,
                                int items, int threads, uint64_t seed) {
  static std::string error;
  const auto with = number == 'f'   ? with_number<float>
                    : number == 'b' ? with_number<quant::Bf16>
                                    : with_number<quant::Fp16>;
  try {
    with(source, x, residual, gain, epsilon, codes, scales, rows, channels, group, items, threads, seed);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

extern "C" void plan(int64_t rows, int channels, int max_threads, int* items, int* threads) {
  const quant::Plan made(rows, channels / quant::kVector, max_threads);
  *items = made.items, *threads = made.threads;
}
