"""`python -m normclip`: the same as the `normclip` command."""

import sys

from normclip.cli import main

sys.exit(main())
