"""Clips on disk: readers, manifests, samples, loaders, and a synthetic set."""
