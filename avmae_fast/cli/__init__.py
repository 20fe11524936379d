"""The command `avmae`. A command imports what it needs when it runs, so that --help is quick."""

from avmae_fast.cli.program import main

__all__ = ["main"]
