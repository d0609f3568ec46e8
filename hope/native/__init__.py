"""C++ on the CPU: `build.py` compiles and loads it, `registers.h` and `threads.h` are what sources
share. The scan's lie in hope/scan/native, those of what surrounds it in hope/fused/native."""
