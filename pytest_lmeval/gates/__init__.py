"""Compare a run with a baseline, and the speed of two versions with each other."""
