"""`scpl compare`: the same network, data and settings under several methods.

May import: app.train, app.bench, the files of app beside it, and what app may import.
"""
