"""Patches in token order and back again, for pictures and for code that wants dense patches."""

from avmae_kernels.patches import gather_patches, patchify, unpatchify

__all__ = ["gather_patches", "patchify", "unpatchify"]
