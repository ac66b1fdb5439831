"""Triton twins of the CUDA kernels: the same loop and the same names, to be read side by side.

forward.py and backward.py hold the kernels (csrc/cuda/sm80/forward.cuh, backward.cuh, csrc/cuda/combine.cuh), launch.py
starts them; simplicial.py has those of 2-simplicial attention, twins of none. Beneath: tile.py (csrc/cuda/tile.cuh),
logits.py (csrc/cuda/logits.cuh), place.py (csrc/cuda/place.cuh), schedule.py (csrc/core/mask.h, schedule.h), problem.py
(csrc/core/problem.h), philox.py (csrc/core/philox.h); tuning.py has the tile sizes.

In names, i_ is a program's or a loop's index, o_ offsets, m_ masks, p_ pointers, b_ a tile or a vector of it; what is
written in capitals is known when a kernel is compiled.
"""
