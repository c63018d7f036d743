"""Tiled attention with an additive bias and its gradient: definition, CPU form, Triton kernels, public function.

The folder is not called attention because `foveal.kernels.attention` is the function.
"""
