"""``python -m proxy`` is the ``steadyread`` command."""

import sys

from proxy.cli import main

sys.exit(main())
