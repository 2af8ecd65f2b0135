"""Compiled kernels: a small C++ library with one build per instruction set, chosen when it is loaded."""
