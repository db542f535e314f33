"""The CPU tier, in Numba: vectors, loops, the schedule that threads follow, and its launch."""
