"""Networks only: torch and foveal.kernels, no training, no files, no pictures."""
