"""How fast it is, and how little it takes, against bars that a run has to clear. `make bench` writes RESULTS.md."""
