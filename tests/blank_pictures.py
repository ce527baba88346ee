"""Pictures that nobody looks at: all is put on their axes, but matplotlib renders none of it.

To render those of a report takes several times as long as the tiny run that it is about. What they
look like is the matter of files that are marked ``pictures``; a process that was started anew
renders its own.
"""

from contextlib import contextmanager
from unittest import mock

import scpl.report.panels

BLANK = {"png": b"\x89PNG\r\n\x1a\n", "svg": b'<svg width="1pt" height="1pt"></svg>'}


@contextmanager
def blank_pictures():
    with mock.patch.object(scpl.report.panels, "_rendered", lambda figure, form: BLANK[form]):
        yield
