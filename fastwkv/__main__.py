"""``python -m fastwkv``."""

import sys

from fastwkv.cli.main import main

sys.exit(main())
