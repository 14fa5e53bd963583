"""Kernels for CPUs in C++, which an installation builds where it finds a compiler; without one the plain path runs."""
