// The current stream, from the CUDA half of libtorch, which is looked up at the first call: a library linked against it
// would not load beside a CPU build of torch. (The stable ABI's own way to a stream's handle begins with torch 2.13.)
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

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
