"""Pretrain and fine-tune masked audiovisual transformers, fast."""
