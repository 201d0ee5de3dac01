// Host stand-in for the CUDA execution model: g++ compiles the kernels unchanged and runs them, one fibre per thread.
//
// It is adversarial rather than fast. A seed decides which warp runs next and when it is preempted; asynchronous copies
// poison their destination when issued and land at a random later time (cp.async: only at its wait); wgmma reads its
// operands either when issued or when waited for, and its registers hold garbage in between; shared memory starts as
// garbage. A missing or early barrier therefore gives wrong numbers, or a deadlock, which is reported as an exception.
//
// Not modelled: encodings of instructions, memory proxies and their fences, alignment faults, register limits, speed.
#pragma once

#include "barriers.h"
#include "copies.h"
#include "cuda.h"
#include "floats.h"
#include "launch.h"
#include "matrix.h"
