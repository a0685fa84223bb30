"""Benchmarks of maefast: token ops (`bench.micro`), one training step (`bench.step`), and the report of both."""
