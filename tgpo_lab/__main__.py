"""``python -m tgpo_lab``, also installed as ``tgpo-lab``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
