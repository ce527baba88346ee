"""The stream: stages, the worker that runs them, what travels between ranks, and checkpoints.

May import: errors, measures, methods, partition, simulation, tasks.
"""
