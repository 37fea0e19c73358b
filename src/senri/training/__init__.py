"""Trains the memory: objective, parameter groups, loop over pieces with carried state, checkpoints, probe."""
