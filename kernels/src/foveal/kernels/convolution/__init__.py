"""Chains of convolutions that answer: bias, SiLU and sums in the same pass, of maps that need not be joined, doubled or padded before."""

from foveal.kernels.convolution.chain import ActivatedConv2d, ConvolutionChain, join
from foveal.kernels.convolution.cpu import Place

__all__ = ["ActivatedConv2d", "ConvolutionChain", "Place", "join"]
