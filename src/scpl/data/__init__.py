"""Data sets: known ones, and the user's own images and texts.

May import: errors.
"""
