"""`scpl bench`: how fast each method trains, measured in turns.

May import: the files of app beside it, and what app may import.
"""
