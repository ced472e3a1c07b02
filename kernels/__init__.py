"""Operators that passes insert: one folder each, with every face of the operator in it.

``reference.py`` is the definition (plain differentiable torch), ``function.py`` the same in standard
ONNX operators, ``cpu.cc`` (``onnxruntime.cc`` where it needs that host), ``cuda.cu`` and ``gpu.py`` (Triton)
the kernels.  :mod:`thresher.kernels.ops` registers all of them with torch under ``torch.ops.thresher``;
:mod:`thresher.kernels.registry` knows their ONNX names, schemas and function bodies.  Importing this package
imports neither torch nor onnx.
"""
