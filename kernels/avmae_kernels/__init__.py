"""The operations avmae_fast computes with; import each from its own module.

On GPUs Triton kernels, elsewhere their plain-PyTorch meaning, which also defines them:
    attention            attention inside each sequence of a packed tensor
    norm                 residual and LayerNorm
    gelu                 GELU with the bias of the layer before it
    patch_embed          patches of uint8 video and of spectrograms to tokens, visible ones only
    assemble             encoded and mask tokens to the decoder's sequences
    reconstruction_loss  squared error against the pixels and the log-mel values of scored tokens

In plain PyTorch on every device:
    logmel               log-mel spectrograms of int16 sound
    self_check           whether a GPU and its compiler compute all of the above rightly

On the host, in C++ (`csrc/`) with a NumPy stand-in:
    masking              masks, permutations and random draws as functions of a key
"""
