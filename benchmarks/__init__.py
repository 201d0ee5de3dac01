"""Proofs of accuracy and speed on real engines; run from the repository's root."""
