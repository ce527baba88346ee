"""What `scpl --help` says, and the examples of single commands."""

from __future__ import annotations

__all__ = ["BENCH_EXAMPLES", "OVERVIEW"]

OVERVIEW = """\
Train one network across several devices without a backward pass between them.

usage: scpl COMMAND [OPTIONS]

commands:
  train     train a network from flags or a recipe
  compare   train the same network with several methods and compare them
  bench     measure how fast several methods train, in turns
  eval      test a trained run
  predict   classify images or texts with a trained run
  export    write a trained network as safetensors
  recipes   list, show or copy the recipes that come with scpl
  doctor    show versions and devices, and what is wrong

examples:
  scpl train                                    # handwritten digits, within a minute
  scpl train --data fashion-mnist --data-dir ~/data --epochs 3
  scpl train recipe.toml --lr 3e-4              # flags override the recipe
  scpl compare --methods scpl,early-exit,bp
  scpl bench --model vgg8 --data cifar10 --synthetic --processes 2
  scpl train --resume runs/digits-small-cnn-scpl

`scpl COMMAND --help` explains one command.
"""

BENCH_EXAMPLES = """
examples:
  scpl bench quick/digits
  scpl bench --model vgg8 --data cifar10 --synthetic --processes 2
  scpl bench --methods scpl,gpipe,ddp --processes 2 --steps 20 --json
"""
