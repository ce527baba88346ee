"""Training on machines that are not here: what they compute and send when, without any of them.

May import: errors.
"""
