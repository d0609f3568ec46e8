"""Triton kernels of the scan; imported only when they are launched, since they need triton.

blocks.py: the closed form of a block of tokens of one memory, and its derivative; memory.py: M_mem
over many blocks; projections.py: M_k, M_v, M_eta, M_alpha (and M_q), which need each other.
"""
