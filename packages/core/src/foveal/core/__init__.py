"""What every Foveal domain shares: command line, tracking, resuming, checkpoints, errors and reports. It knows no domain.

`errors`, `files` and `reports` import nothing heavy, so that a command's help and its first checks cost no torch import.
"""
