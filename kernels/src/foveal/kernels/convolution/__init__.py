"""Chains of convolutions that answer: bias, SiLU and sums in the same pass, of maps that need not be joined, doubled or padded before."""
