"""The operators that passes insert: definition in torch, ONNX function body, optional kernels.

One folder per operator.  ``ops`` registers them with torch, ``registry`` describes them to ONNX.
"""
