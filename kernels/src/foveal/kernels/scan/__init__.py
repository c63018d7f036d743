"""Selective scan (K7): the diagonal state-space recurrence of Mamba with input-dependent step size, input and output matrices."""
