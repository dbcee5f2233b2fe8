"""Kernels for float32 on a CPU: what torch would do in several small operations, in one.

Each module has functions of tensors, and behind them functions that numba compiles. They say the same as torch's
operations beside which they are used, where those are for other devices and dtypes and are the reference in tests, with
one difference: a row has the same bits whatever the other rows are, how many, and how many threads there are.
"""
