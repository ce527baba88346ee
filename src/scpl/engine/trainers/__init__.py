"""What turns a batch into an update: the stream itself, torch's schedules, replicas.

May import: the rest of engine, and what engine may import.
"""
