"""`scpl train`: one run, from its configuration to its summary.

May import: the files of app beside it, and what app may import.
"""
