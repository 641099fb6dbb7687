"""Benchmarks: Pillion beside no mesh and Envoy, interleaved in one run, reported as ratios."""
