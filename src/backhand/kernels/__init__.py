"""Compiled kernels: a small C++ library beside torch, one build an instruction set, chosen when it is loaded."""
