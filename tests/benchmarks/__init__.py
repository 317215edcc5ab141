"""How fast it is, against something that anyone can run: `python tests/benchmarks/run.py --help`."""
