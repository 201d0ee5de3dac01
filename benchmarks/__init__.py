"""Proofs of accuracy and speed on real engines; run from the repository's root.

An *arm* is one of the things that a benchmark compares: a way to convert, a checkpoint, an engine. A *planted* model is
a trained one with outlier columns put in that leave what it computes as it was (:mod:`benchmarks.testbed.plant`).
"""
