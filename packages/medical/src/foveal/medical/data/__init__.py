"""Volumes and pictures with labels, as folders of the corpora that practitioners have."""
