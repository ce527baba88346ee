"""Loss formulas: pure functions of tensors that know nothing of stages, heads or devices.

May import: errors.
"""
