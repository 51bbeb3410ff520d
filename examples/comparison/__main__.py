"""`python -m examples.comparison [table|search|show]`: self-play beside what it has to be compared with."""

from __future__ import annotations

from examples.comparison.command import main

main()
