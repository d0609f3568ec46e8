"""A machine for PTX: runs compiled Triton kernels on the CPU, as a GPU's threads would.

Triton's interpreter runs a kernel's source; this runs what the compiler made of it, so that it
shows what the interpreter can't: bfloat16 as tensor cores take it, a compiler's mistakes, accesses
outside of a tensor or of shared memory, and races between the threads of a program.
"""
