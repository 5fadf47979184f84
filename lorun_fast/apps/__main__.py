"""``python -m lorun_fast.apps`` is the ``lorun-fast`` command."""

import sys

from lorun_fast.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
