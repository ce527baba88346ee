"""What the command line calls: configurations, runs, comparisons, benchmarks.

May import: everything else.
"""
