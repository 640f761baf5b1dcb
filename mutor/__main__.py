"""python -m mutor COMMAND"""

import sys

from mutor.cli import main

sys.exit(main())
