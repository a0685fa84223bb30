"""The stages of bench/gpu_check.sh: see docs/gpu.md."""
