"""From media files to batches: readers, manifests, windows, the loader, synthetic clips."""
