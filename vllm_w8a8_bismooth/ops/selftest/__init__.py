"""The self-test of compiled kernels: whether each does on this device what the reference does.

A kernel that is wrong may also destroy the process that runs it, or never end. So a process of its own runs the tests
(``python -m vllm_w8a8_bismooth.ops.selftest``: :mod:`cases` on :mod:`machine`), :mod:`examination` watches it, and a
:mod:`verdict` is what comes out.
"""
