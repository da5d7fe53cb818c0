"""`python -m graftwork.cli`: the command, for launchers that want a module (torchrun -m, accelerate launch -m)."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
