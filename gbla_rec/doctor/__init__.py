"""Whether this environment can run training: checks that find a problem and name its cure, and need no library to start."""
