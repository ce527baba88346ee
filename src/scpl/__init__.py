"""Train one network across several devices without a backward pass between them."""

__version__ = "0.1.0"
