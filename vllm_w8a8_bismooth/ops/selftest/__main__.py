"""``python -m vllm_w8a8_bismooth.ops.selftest``: runs the cases, and says after each how it went, in lines of JSON."""

from vllm_w8a8_bismooth.ops.selftest import machine, process

if __name__ == "__main__":
    process.main(lambda index: machine.Cpu() if index is None else machine.Gpu(index))
