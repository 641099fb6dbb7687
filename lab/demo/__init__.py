"""A small shop of real parts on two nodes, and what a mesh does for it: `python -m lab.demo [--keep]`."""
