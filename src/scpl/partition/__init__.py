"""Cut a network into stages, and prove that nothing changed.

May import: errors, tasks.
"""

from scpl.partition.cutting import Partition, split

__all__ = ["Partition", "split"]
