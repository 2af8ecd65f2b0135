"""Compiled kernels: a small C++ library with one build per instruction set, chosen at load time."""
