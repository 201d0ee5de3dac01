// What launches ask of the runtime: the current stream, and which code of a kernel the device runs.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>

constexpr int MAX_DEVICES = 64;

/// Devices on which no kernel may start before the one ahead of it has ended, nor load weights early.
inline std::atomic<bool> one_after_another[MAX_DEVICES];

/// From the CUDA half of libtorch, which is looked up at the first call: a library linked against it would not load
/// beside a CPU build of torch. (The stable ABI's own way to a stream's handle begins with torch 2.13.)
inline cudaStream_t current_stream(int32_t device) {
  using Get = int (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

/// The architecture (90: 9.0) that the kernel's code on the current device was compiled for: below the device's own
/// where that runs PTX or binaries of an older one, which do not use all that the device has.
inline int compiled_for(const void* kernel) {
  cudaFuncAttributes code{};
  const cudaError_t status = cudaFuncGetAttributes(&code, kernel);
  if (status != cudaSuccess) cudaGetLastError();  // or torch would report it again
  STD_TORCH_CHECK(status == cudaSuccess,
                  "the compiled kernels do not load on this device: ", cudaGetErrorString(status),
                  " (TORCH_CUDA_ARCH_LIST must name its compute capability when they are built)");
  return code.ptxVersion;
}
