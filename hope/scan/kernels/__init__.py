"""Triton kernels of the scan; imported only when they are launched, since they need triton.

writes.py, writes_backward.py: a block of tokens of one memory, with M_mem's read, and its
derivative; projections.py: what is read out of M_k, M_v, M_eta, M_alpha (and M_q).
"""
