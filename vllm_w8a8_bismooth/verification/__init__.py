"""The check of a converted checkpoint: its structure, its contents, vLLM's own reading, and its source.

Everything that is wrong is collected; nothing stops at the first fault. Memory is bounded by a few pieces of tensors.
"""

from vllm_w8a8_bismooth.verification.verify import Verification, verify

__all__ = ["Verification", "verify"]
