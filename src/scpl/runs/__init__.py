"""The run folder: which files a run leaves behind, how they are written and read.

May import: errors.
"""

from scpl.runs.folder import Event, LoggedStep, RunFolder, RunRecord

__all__ = ["Event", "LoggedStep", "RunFolder", "RunRecord"]
