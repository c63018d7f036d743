"""Networks of this domain, one file each; they import torch and foveal.kernels only."""
