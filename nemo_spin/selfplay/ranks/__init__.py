"""What the ranks of a stage do: one file per stage, run by `nemo_spin.selfplay.worker`."""
