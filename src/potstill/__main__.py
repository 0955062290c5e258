"""python -m potstill"""

import sys

from potstill.cli import main

if __name__ == "__main__":
    sys.exit(main())
