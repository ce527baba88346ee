"""``scpl ...`` as a rank at its end of the cable that `links.Cable` made."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from links import go_to_cable
from scpl.app.cli import main

go_to_cable()
main(sys.argv[1:])
