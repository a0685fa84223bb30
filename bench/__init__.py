"""Benchmarks of maefast: token ops (`maefast.bench.micro`), one training step (`maefast.bench.step`), and the report of both."""
