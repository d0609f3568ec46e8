"""Triton kernels of the scan; imported only when they are launched, since they need triton.

projections.py: what is read out of M_k, M_v, M_eta, M_alpha (and M_q); frames.py: what all memories
share in a block of tokens; writes.py, writes_backward.py: the block written into one memory, with
M_mem's read, and its derivative.
"""
