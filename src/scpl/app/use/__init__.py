"""What a finished run is good for: evaluate, predict, export, look inside.

May import: the files of app beside it, and what app may import.
"""
