"""What the Triton kernels (``gpu.py`` of each operator) share.

Only :mod:`thresher.kernels.gpu.dispatch` may be imported without Triton.  Kernels read their inputs
through strides, compute in float32, and never wait for the device, so that CUDA graphs can hold them.
"""
