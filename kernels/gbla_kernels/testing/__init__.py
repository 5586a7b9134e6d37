"""For tests of jagged ops: input factories and the fp64 error budget."""
