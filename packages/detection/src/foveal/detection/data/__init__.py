"""Labelled pictures: what is in the formats people have, and how training reads them."""
