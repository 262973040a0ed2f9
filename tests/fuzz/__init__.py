"""Differential fuzzing of the public functions against exact oracles: ``make fuzz ARGS="--minutes 10 --seed 1"``.

A case is a pair of seed and number: these decide on a check, its inputs, and the state that it runs in (`draw`). Checks (`checks/`) call
normclip and compare with references that share nothing with it (`oracles`). `run` spreads cases over processes, so that a hang or a crash
is a finding too, and `__main__` is the command line.
"""
