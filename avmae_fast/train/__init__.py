"""Pretraining: recipe, loop, checkpoints and report."""
