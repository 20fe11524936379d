"""Weights in and out: the names and layouts of other code bases."""
