"""`python -m rostra.connect_proxy`: the same as `rostra connect proxy`, without importing the command line."""

import sys

from rostra.connect_proxy.run import main

sys.exit(main())
