"""``python -m studies.testbed``."""

import sys

from studies.testbed.command import main

sys.exit(main())
